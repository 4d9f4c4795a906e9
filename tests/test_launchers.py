"""The launchers in tpu/: what they would run, word for word, and what they refuse."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from vibejax.planning import slices

TPU = Path(__file__).parents[1] / "tpu"
SCRIPTS = sorted(TPU.glob("*.sh"))
QUEUED = "gcloud compute tpus queued-resources"
# A space, both quotes, what shells and Kubernetes expand, what YAML and templates read otherwise.
COMMAND = ["python", "-m", "vibejax.rl", "a b.toml", "--set", "out='x'", 'p="$HOME"', "`id`; $(id)",
           "${NAME}", "*", "\\", "&", "no: # é"]  # fmt: skip


def run(script, *words, **options):
    return subprocess.run(
        ["bash", str(TPU / script), *words], capture_output=True, text=True, timeout=60, **options
    )


def shown(script, *words, **options):
    """The lines that --dry-run prints."""
    done = run(script, "--dry-run", *words, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def parsed(line):
    """The words of a line as bash reads them."""
    done = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True
    )
    return done.stdout.split("\0")[:-1]


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """Programs of these names write their words into files instead; what they were told."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "bin").mkdir()

    def record(*names, status=0):
        for name in names:
            program = tmp_path / "bin" / name
            lines = ["#!/bin/sh", f"exec >>'{tmp_path / name}.log'", "printf '%s\\0' \"$@\""]
            program.write_text("\n".join([*lines, "printf '\\001'", f"exit {status}", ""]))
            program.chmod(0o755)

        def calls(name):
            log = tmp_path / f"{name}.log"
            ended = log.read_text().split("\1")[:-1] if log.exists() else []
            return [call.split("\0")[:-1] for call in ended]

        return calls

    return record


def tool(name):
    """A program that a wheel of the extra `test` brings."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name) or name


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_pass_shellcheck(script):
    done = subprocess.run(
        [tool("shellcheck"), "--external-sources", f"--source-path={TPU.parent}", str(script)],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    if script.name != "launcher.sh":  # which is sourced by those that say it
        assert "\nset -euo pipefail\n" in script.read_text()
        assert os.access(script, os.X_OK)


def test_the_dockerfile_passes_hadolint():
    done = subprocess.run(
        [tool("hadolint"), str(TPU / "Dockerfile")], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "")


ZONE = ["--zone", "us-west4-a"]


@pytest.mark.parametrize(
    "words, lines",
    [
        (
            ["create", "rl", "--slice", "v5e-16", *ZONE, "--spot"],
            [
                f"{QUEUED} create rl --node-id=rl --spot --accelerator-type=v5litepod-16 "
                "--runtime-version=v2-alpha-tpuv5-lite --zone=us-west4-a"
            ],
        ),
        (
            ["create", "rl", "--slice", "4xv5p-8", "--project", "p-1"],
            [
                f"{QUEUED} create rl --node-count=4 --node-prefix=rl --accelerator-type=v5p-8 "
                "--runtime-version=v2-alpha-tpuv5 --project=p-1"
            ],
        ),
        (["status", "rl"], [f"{QUEUED} describe rl --format=value\\(state.state\\)"]),
        (
            ["logs", "rl", *ZONE, "--worker", "3"],
            [
                f"{QUEUED} ssh rl --node=0 --worker=3 "
                "--command=bash\\ vibejax/tpu/worker.sh\\ logs --zone=us-west4-a"
            ],
        ),
        (
            ["stop", "rl"],
            [
                f"{QUEUED} ssh rl --node=all --worker=all "
                "--command=bash\\ vibejax/tpu/worker.sh\\ stop"
            ],
        ),
        (["delete", "rl", *ZONE], [f"{QUEUED} delete rl --force --quiet --zone=us-west4-a"]),
    ],
    ids=lambda x: x[0].split()[0],
)
def test_what_a_pod_launcher_would_run(words, lines):
    assert shown("pod.sh", *words) == lines


def test_setup_copies_the_checkout_to_all_workers_and_installs_it_there():
    archive, copy, unpack, install = map(parsed, shown("pod.sh", "setup", "rl"))
    assert archive[:3] == ["git", "archive", "--prefix=vibejax/"] and archive[-1] == "HEAD"
    path = archive[3].removeprefix("--output=")
    assert not Path(path).parent.exists(), "what was archived is removed"
    queued = QUEUED.split()
    everywhere = ["--node=all", "--worker=all"]
    assert copy == [*queued, "scp", path, "rl:", *everywhere]
    assert unpack == [*queued, "ssh", "rl", *everywhere, "--command=tar xzf vibejax.tar.gz"]
    assert install == [
        *queued, "ssh", "rl", *everywhere, "--command=bash vibejax/tpu/worker.sh setup"
    ]  # fmt: skip


def test_a_worker_brings_its_own_python_and_sandbox(recorded, tmp_path):
    path = f"{tmp_path}/bin:/usr/bin:/bin"
    lines = [parsed(line) for line in shown("worker.sh", "setup", env={"HOME": "/h", "PATH": path})]
    assert [*map(" ".join, lines)][-3:-1] == [
        "uv venv --allow-existing --python >=3.11,<3.14 /h/vibejax-venv",
        f"uv pip install --quiet --python /h/vibejax-venv/bin/python --editable {TPU.parent}[tpu]",
    ]
    assert lines[0][0] == "curl" and lines[0][-1].startswith("https://astral.sh/uv/")
    recorded("uv", "bwrap")
    lines = shown("worker.sh", "setup", env={"HOME": "/h", "PATH": path})
    assert {line.split()[0] for line in lines} == {"uv", "/h/vibejax-venv/bin/python"}


def test_a_command_reaches_the_service_on_a_worker_word_for_word(recorded, tmp_path):
    calls = recorded("gcloud", "sudo", "python")
    done = run("pod.sh", "run", "rl", "--", *COMMAND)
    assert done.returncode == 0, done.stderr
    ((*_, words),) = calls("gcloud")
    on_worker = parsed(words.removeprefix("--command="))
    assert on_worker == ["bash", "vibejax/tpu/worker.sh", "start", *COMMAND]
    done = run("worker.sh", *on_worker[2:])
    assert done.returncode == 0, done.stderr
    ((*unit, bash, file),) = calls("sudo")
    assert unit[0] == "systemd-run" and bash == "bash"
    settings = {"Restart=on-failure", "RestartPreventExitStatus=2", "KillMode=mixed"}
    assert {f"--property={setting}" for setting in settings} <= {*unit}
    assert f"--working-directory={TPU.parent}" in unit
    subprocess.run(["bash", file], check=True, timeout=60)
    assert calls("python") == [COMMAND[1:]]


SLICES = {
    "v5e-4": (1, 4), "v5e-16": (1, 16), "v5e-256": (1, 256), "v6e-8": (1, 8), "v4-8": (1, 4),
    "v5p-8": (1, 4), "v5p-1024": (1, 512), "tpu7x-8": (1, 4), "2xv5e-256": (2, 256),
}  # fmt: skip


def test_the_launchers_know_the_slices_that_can_be_planned():
    """But for single chips: their VMs have four."""
    kinds = [kind for kind, chip in slices.CHIPS.items() if chip.platform == "tpu"]
    names = [f"{kind}-{size}" for kind in kinds for size in slices.SHAPES[kind]]
    planned = {name: slices.find(name) for name in names}
    asked = [*names, *(f"{kind}-4096" for kind in kinds), "2xv5p-16", "v6e-12"]
    lines = ['source "$0"', "for name; do"]
    lines += ['(describe_slice "$name" && echo "$name $slices $topology $hosts")', "done"]
    words = ["bash", "-c", "\n".join(lines), str(TPU / "launcher.sh"), *asked]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    sold = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert sold.pop("2xv5p-16") == "2 2x2x2 2"
    assert {*planned} - {*sold} == {"v5e-1", "v6e-1"} and not {*sold} - {*planned}
    for name, told in sold.items():
        where = planned[name]
        topology = "x".join(map(str, where.shape))
        assert told == f"1 {topology} {where.chips // 4}", name


def manifest(*words):
    first, *lines = shown("gke.sh", "run", *words)
    assert first == "# kubectl apply --filename=-"
    return yaml.safe_load("\n".join(lines))


@pytest.mark.parametrize("name", SLICES)
def test_a_manifest_has_a_pod_for_every_four_chips(name):
    count, chips = SLICES[name]
    jobset = manifest("rl", "--slice", name, "--image", "gcr.io/p/v:1", "--", *COMMAND)
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert job["replicas"] == count
    assert spec["parallelism"] == spec["completions"] == chips // 4
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    assert math.prod(map(int, topology.split("x"))) == chips


def test_a_manifest_says_what_was_asked_for():
    words = ["rl", "--slice", "v5e-16", "--image", "gcr.io/p/v@sha256:1", "--", *COMMAND]
    jobset = manifest(*words)
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert jobset["metadata"]["name"] == "rl"
    assert container["image"] == "gcr.io/p/v@sha256:1"
    # Kubernetes reads "$(" as the beginning of a variable, and "$$(" as "$(".
    assert [word.replace("$$(", "$(") for word in container["args"]] == COMMAND
    assert not any(word.replace("$$(", "").count("$(") for word in container["args"])
    assert pod["serviceAccountName"] == "default"
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    jobset = manifest("rl", "--spot", "--service-account", "writer", *words[1:])
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert pod["serviceAccountName"] == "writer"


# The fields that we could write, as api/jobset/v1alpha2/jobset_types.go of JobSet names them; a Job
# inside of it is checked against Kubernetes' own schema, in tests/parity.
JOBSET = {
    "apiVersion": None, "kind": None, "metadata": None,
    "spec": {
        "replicatedJobs": {"name": None, "groupName": None, "template": None, "replicas": None,
                           "dependsOn": {"name": None, "status": None}},
        "network": {"enableDNSHostnames": None, "subdomain": None,
                    "publishNotReadyAddresses": None},
        "successPolicy": {"operator": None, "targetReplicatedJobs": None},
        "failurePolicy": {
            "maxRestarts": None, "restartStrategy": None,
            "rules": {"name": None, "action": None, "onJobFailureReasons": None,
                      "targetReplicatedJobs": None},
        },
        "suspend": None, "coordinator": None, "managedBy": None, "ttlSecondsAfterFinished": None,
    },
}  # fmt: skip


def unknown(value, names, path=""):
    """Dotted paths of the fields that are not among the names."""
    if names is None:
        return
    for entry in value if isinstance(value, list) else [value]:
        for name, inner in entry.items():
            if name in names:
                yield from unknown(inner, names[name], f"{path}.{name}")
            else:
                yield f"{path}.{name}"


def test_a_manifest_has_published_fields_alone():
    jobset = manifest("rl", "--slice", "2xv5e-16", "--image", "i", "--", *COMMAND)
    assert not [*unknown(jobset, JOBSET)]
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    jobset["spec"]["failurePolicy"]["rules"][0]["onFailure"] = "x"
    assert [*unknown(jobset, JOBSET)] == [".spec.failurePolicy.rules.onFailure"]


def test_only_an_end_after_a_sigterm_restarts_without_counting():
    jobset = manifest("rl", "--slice", "v5e-16", "--image", "i", "--", *COMMAND)
    policy = jobset["spec"]["failurePolicy"]
    (rule,) = policy["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == (
        "RestartJobSetAndIgnoreMaxRestarts", ["PodFailurePolicy"],
    )  # fmt: skip
    assert policy["maxRestarts"] > 0
    spec = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    taken, ended = spec["podFailurePolicy"]["rules"]
    assert taken["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert ended["onExitCodes"]["operator"] == "In" and ended["onExitCodes"]["values"] == [143]
    (container,) = spec["template"]["spec"]["containers"]
    assert ended["onExitCodes"]["containerName"] == container["name"]
    assert spec["backoffLimit"] == 0 and spec["template"]["spec"]["restartPolicy"] == "Never"
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] > 25


def test_the_manifest_is_what_kubectl_gets(recorded, tmp_path):
    recorded()
    program = tmp_path / "bin" / "kubectl"
    program.write_text(f"#!/bin/sh\necho \"$@\" >'{tmp_path}/words'; cat >'{tmp_path}/applied'\n")
    program.chmod(0o755)
    words = ["rl", "--slice", "v5e-16", "--image", "i", "--", *COMMAND]
    assert run("gke.sh", "run", *words).returncode == 0
    assert (tmp_path / "words").read_text() == "apply --filename=-\n"
    assert yaml.safe_load((tmp_path / "applied").read_text()) == manifest(*words)


def test_node_pools_image_and_the_rest_on_gke():
    pool = ("--cluster=c --location=us-west4 --node-locations=us-west4-a "
            "--machine-type=ct5lp-hightpu-4t --num-nodes=4 --scopes=cloud-platform "
            "--tpu-topology=4x4 --spot")  # fmt: skip
    asked = ["--slice", "2xv5e-16", "--cluster", "c", "--location", "us-west4", *ZONE, "--spot"]
    assert shown("gke.sh", "nodes", "rl", *asked) == [
        f"gcloud container node-pools create rl-{i} {pool}" for i in range(2)
    ]
    assert shown("gke.sh", "image", "--image", "i:1") == [
        "docker build --file tpu/Dockerfile --tag i:1 .", "docker push i:1",
    ]  # fmt: skip
    chosen = "--selector=jobset.sigs.k8s.io/jobset-name=rl"
    assert shown("gke.sh", "status", "rl") == [f"kubectl get jobset\\,pods {chosen}"]
    assert shown("gke.sh", "logs", "rl")[0].endswith(f"--container=vibejax {chosen}")
    assert shown("gke.sh", "delete", "rl") == ["kubectl delete jobset rl"]


def test_xpk_gets_the_command_as_one_line_of_bash():
    words = ["--slice", "2xv5e-256", "--image", "i", "--cluster", "c", "--spot", "--", *COMMAND]
    (line,) = shown("gke.sh", "xpk", "rl", *words)
    *options, command = parsed(line)
    assert options[:3] == ["xpk", "workload", "create"]
    assert {"--workload=rl", "--cluster=c", "--tpu-type=v5litepod-256", "--num-slices=2",
            "--docker-image=i", "--spot"} <= {*options}  # fmt: skip
    assert parsed(command.removeprefix("--command=")) == ["exec", *COMMAND]


def test_slurm_submits_itself(recorded, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    calls = recorded("sbatch", "srun")
    assert run("slurm.sh", "--nodes=2", "--", *COMMAND).returncode == 0
    ((option, script, dashes, *command),) = calls("sbatch")
    assert (option, dashes, command) == ("--nodes=2", "--", COMMAND)
    assert Path(script).name == "slurm.sh" and not calls("srun")
    submitted, step, _ = shown("slurm.sh", "--nodes=2", "--", *COMMAND)
    assert parsed(submitted)[1:2] == ["--nodes=2"]
    assert parsed(step.partition("in the job: ")[2]) == [
        "srun", "--kill-on-bad-exit=0", "--wait=300", *COMMAND
    ]  # fmt: skip


@pytest.mark.parametrize(
    "status, restarts, again",
    [(0, 0, False), (1, 0, False), (143, 9, True), (75, 4, True), (75, 5, False)],
)
def test_a_slurm_job_is_queued_again_where_that_helps(
    recorded, monkeypatch, status, restarts, again
):
    """After a SIGTERM always, after the watchdog a few times, after other errors never."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
    recorded("srun", status=status)
    calls = recorded("scontrol")
    assert run("slurm.sh", "--", *COMMAND).returncode == status
    assert [call[2:] for call in calls("srun")] == [COMMAND]
    assert calls("scontrol") == [["requeue", "7"]] * again


@pytest.mark.parametrize(
    "script, words, message",
    [
        ("pod.sh", ["create", "a b", "--slice", "v5e-16"], r"name a\ b: must match"),
        ("pod.sh", ["create", "a;id", "--slice", "v5e-16"], r"name a\;id: must match"),
        ("pod.sh", ["create", "a", "--slice", "v5e-17"], "slice v5e-17: nobody sells it; known"),
        ("pod.sh", ["create", "a", "--slice", "v5p-4"], "slice v5p-4: nobody sells it; known"),
        ("pod.sh", ["create", "a", "--slice", "h100-8"], "slice h100-8: nobody sells it"),
        ("pod.sh", ["create", "a", "--slice", "x"], "slice x: nobody sells it"),
        ("pod.sh", ["create", "a", "--slice", "tpu7x-8"], "is sold through GKE alone; see tpu/gke"),
        ("pod.sh", ["create", "a"], "create: needs --slice, such as v5e-16"),
        ("pod.sh", ["create", "a", "--slice"], "--slice: needs a value"),
        ("pod.sh", ["stop", "a", "--zone", "$(id)"], r"--zone \$\(id\): must match"),
        ("pod.sh", ["logs", "a", "--worker", "first"], "--worker first: must match all|[0-9]+"),
        ("pod.sh", ["run", "a"], "run: needs -- and a command"),
        ("pod.sh", ["run", "a", "python"], "python: unknown; --slice, --zone"),
        ("pod.sh", ["start", "a"], "start: must be create, status, setup, run, logs, stop or"),
        ("pod.sh", [], "create|status|setup|run|logs|stop|delete NAME"),
        ("worker.sh", ["begin"], "'begin': must be setup, start, logs or stop"),
        ("worker.sh", ["start"], "start: needs a command"),
        ("gke.sh", ["run", "a", "--slice", "v5e-16", "--", "b"], "run: needs --image"),
        ("gke.sh", ["run", "a", "--slice", "v5e-16", "--image", "i"], "needs -- and a command"),
        ("gke.sh", ["image", "--image", 'i", x'], r"--image i\"\,\ x: must match"),
        ("gke.sh", ["run", "a\nb: c", "--slice", "v5e-16"], "must match"),
        ("gke.sh", ["nodes", "a", "--slice", "v5e-16"], "nodes: needs --cluster"),
        (
            "gke.sh",
            ["run", "a", "--slice", "v5e-16", "--image", "i", "--", "b\n- c"],
            "holds a control character",
        ),
        ("gke.sh", ["apply", "a"], "'apply': must be image, nodes, run"),
        ("slurm.sh", ["--nodes=2"], "slurm.sh: needs -- and a command"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_runs_nothing(recorded, script, words, message):
    calls = recorded("gcloud", "kubectl", "docker", "sbatch", "srun", "sudo", "uv")
    done = run(script, *words)
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.count("\n") == 1
    assert done.stdout == ""
    for name in ("gcloud", "kubectl", "docker", "sbatch", "srun", "sudo", "uv"):
        assert not calls(name)
