"""The generated domains: nothing is in two files, and demonstrations are what they say."""

import collections
import hashlib
import itertools

import pytest

from vibejax import domains
from vibejax.verifiers.pool import Pool

DOMAINS = ("math", "code", "stem", "instruct")


@pytest.fixture(scope="module")
def files():
    return domains.all_files(0)


def test_no_question_is_in_two_files_and_none_twice(files):
    seen = collections.Counter()
    for name, records in files.items():
        prompts = [record["prompt"] for record in records]
        assert len(set(prompts)) == len(prompts) // domains.DEMONSTRATIONS.get(name, 1)
        seen.update(set(prompts))
    assert max(seen.values()) == 1
    # Nor the same pair of numbers, whatever the options or the factor beside it.
    for domain, pair in (("math", r"+"), ("stem", "-")):
        held = {r["prompt"].split(pair)[0] + r["prompt"].split(pair)[1][:3]
                for r in files[f"{domain}_heldout"]}  # fmt: skip
        learnt = {r["prompt"].split(pair)[0] + r["prompt"].split(pair)[1][:3]
                  for r in files["base"] + files["sft"] if r["domain"] == domain}  # fmt: skip
        assert held and learnt and not held & learnt


def test_base_is_what_the_shipped_policy_has_read(files):
    """A change of what is drawn could put prompts that it knows into another file."""
    prompts = "".join(record["prompt"] for record in files["base"])
    digest = hashlib.sha256(prompts.encode()).hexdigest()
    assert digest == "714485250f2a23fa162b5abd5f77247f0d428db0f6c9ef189f3ea8fc0f0921b0", (
        "make the shipped policy anew: configs/quickstart_sft.toml"
    )


def test_files_are_a_function_of_the_seed(files):
    assert domains.all_files(0) == files
    assert domains.all_files(1)["math_train"] != files["math_train"]
    assert len(files["math_heldout"]) == 512


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        domains.main([str(tmp_path / "file")])
    assert capsys.readouterr().err.startswith("error: ")


def test_demonstrations_are_right_except_those_of_instruct_and_guesses(files):
    shares = {"instruct": 0.5, "stem": 1 - 0.4 * 3 / 4}  # a guess is right in one of four cases
    with Pool(workers=2) as pool:
        for kind, domain in itertools.product(("base", "sft"), DOMAINS):
            some = [r for r in files[kind] if r["domain"] == domain][:60]
            verdicts = pool.verify([(r, r["completion"]) for r in some])
            right = sum(v.correct for v in verdicts)
            assert all(v.scored for v in verdicts)
            if domain == "instruct" or (kind, domain) == ("sft", "stem"):
                assert abs(right / len(some) - shares[domain]) < 0.2  # three standard errors
            else:
                assert right == len(some), [
                    (r, v) for r, v in zip(some, verdicts, strict=True) if not v.correct
                ]


def test_a_wrong_answer_is_wrong_in_every_domain(files):
    with Pool(workers=1) as pool:
        for domain in DOMAINS:
            one, other = itertools.islice((r for r in files["sft"] if r["domain"] == domain), 2)
            other = next(
                r for r in files["sft"]
                if r["domain"] == domain and r.get("ground_truth", r.get("tests"))
                != one.get("ground_truth", one.get("tests"))
            )  # fmt: skip
            (verdict,) = pool.verify([(one, other["completion"])])
            assert verdict.scored and not verdict.correct


def test_differences_are_written_out_as_by_hand():
    assert domains.borrows(482, 137) == "12-7=5 7-3=4 4-1=3"
    assert domains.borrows(500, 1 + 100) == "10-1=9 9-0=9 4-1=3"
    for a, b in itertools.combinations(range(999, 100, -37), 2):
        digits = [step.split("=")[1] for step in domains.borrows(a, b).split()]
        assert int("".join(reversed(digits))) == a - b


def test_sums_in_full_are_written_as_by_hand(files):
    assert domains.in_full(405) == "405=400+00+5"
    by_style = collections.Counter(
        record["completion"].count("=") for record in files["base"] if record["domain"] == "math"
    )
    assert by_style.keys() == {0, 3, 5}  # bare, written, in full
    assert by_style[0] > by_style[3] > 0 and by_style[5] > 0


def test_letters_are_those_of_the_ranges(files):
    for record in files["stem_heldout"]:
        difference, options = record["prompt"].split(" tens: ")
        a, b = difference.split("-")
        names, ranges = options.split()[::2], options.split()[1::2]
        (right,) = (
            name for name, (low, _, high) in zip(names, ranges, strict=True)
            if int(low) <= int(f"{int(a) - int(b):03d}"[1]) <= int(high)
        )  # fmt: skip
        assert record["ground_truth"] == right
