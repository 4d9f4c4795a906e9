"""Every stage's configuration: what can be set, its default and its meaning.

A field that a file does not set keeps the default written here, so this module is the whole
list of what can be configured; `config_file` reads and writes the files.
"""

from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from vibejax.config_file import Section

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Dtype = Literal["float32", "bfloat16"]
Name = Annotated[str, Field(pattern="^[A-Za-z0-9_-]+$", max_length=64)]  # part of a file name
# auto: the same command starts a run and goes on with it, as a pod's does that is started again.
Resume = Literal[False, True, "auto"]


def _field(default: Any, meaning: str) -> Any:
    return Field(default=default, description=meaning)


class MeshConfig(Section):
    """How many devices lie on each mesh axis."""

    data: Count = _field(1, "replicas of the whole state")
    fsdp: Count = _field(1, "devices that share parameters, optimizer state and rows")
    context: Count = _field(1, "devices that share the tokens of a row")
    tensor: Count = _field(1, "devices that share heads, feed-forward width and vocabulary")


class ModelSizes(Section):
    """A model to create from random weights; the vocabulary is the tokenizer's."""

    layers: Count = _field(4, "transformer layers")
    width: Count = _field(128, "model width")
    heads: Count = _field(4, "query heads")
    kv_heads: Count = _field(2, "key/value heads; divides `heads`")
    head_dim: Count = _field(32, "width of a head, even")
    mlp: Count = _field(384, "feed-forward width")
    rope_theta: Positive = _field(10_000.0, "base of the rotary wavelengths")
    context: Count = _field(512, "positions")

    @pydantic.model_validator(mode="after")
    def _divides(self):
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads = {self.kv_heads} must divide heads = {self.heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim} must be even: pairs are rotated")
        return self


class OptimizerConfig(Section):
    """AdamW with warm-up, gradient clipping and a schedule."""

    learning_rate: Positive = _field(1e-6, "peak learning rate")
    schedule: Literal["constant", "linear", "cosine"] = _field(
        "constant", "course of the learning rate after warm-up, down to `final_learning_rate`"
    )
    final_learning_rate: NotNegative = _field(0.0, "learning rate at the last step")
    warmup: NotNegative = _field(0.0, "share of all steps over which the rate rises from 0")
    beta1: NotNegative = _field(0.9, "decay of the mean gradient")
    beta2: NotNegative = _field(0.999, "decay of the mean square")
    epsilon: Positive = _field(1e-8, "added to the root of the mean square")
    weight_decay: NotNegative = _field(0.0, "decoupled decay of matrices; biases and norms: none")
    clip_norm: Positive = _field(1.0, "largest global norm of the gradient")


class TrainConfig(Section):
    """How documents become rows and rows become gradients; no choice here changes the result."""

    row_tokens: Count = _field(
        65_536, "tokens of a packed row; mesh.context cuts it in multiples of 512, or in less"
    )
    microbatch_rows: Count = _field(
        1, "rows of one backward pass, a multiple of mesh.data x mesh.fsdp"
    )
    remat: Literal["none", "full", "attention", "offload"] = _field(
        "none", "what is recomputed in the backward pass; see qwen2.hidden_states"
    )
    dtype: Dtype = _field("float32", "of the computation; masters and sums are float32 anyway")


class AttentionConfig(Section):
    """How attention is computed; no choice here changes the result."""

    implementation: Literal[
        "auto", "reference", "xla", "tpu", "gpu", "tpu_interpreted", "gpu_interpreted"
    ] = _field("auto", "over packed rows; see vibejax.attention")


class SamplerConfig(Section):
    """How completions are sampled, and by an engine of which sizes."""

    max_prompt_tokens: Count = _field(2_048, "a longer prompt is an error that names it")
    max_completion_tokens: Count = _field(63_488, "longest completion, stop token included")
    temperature: Positive = _field(1.0, "divides the logits; 1 samples the policy itself")
    top_p: Share = _field(1.0, "probability mass kept by nucleus sampling")
    top_k: Natural = _field(0, "likeliest tokens kept; 0 keeps all")
    min_tokens: Natural = _field(0, "before so many tokens no completion stops")
    loop_tokens: Natural = _field(
        0, "a completion ends that repeats itself for so many tokens, at most 64 apart; 0: none"
    )
    slots: Count = _field(64, "completions decoded at one time, over a host's devices")
    window: Count = _field(16, "decode steps between two looks at what has ended")
    page_tokens: Count = _field(64, "tokens of a page of keys and values")
    pool_tokens: Natural = _field(
        0, "tokens that a host's pages hold; 0: as many as its slots can use or its memory has"
    )
    chunk_tokens: Count = _field(
        128,
        "tokens of a prompt computed between two windows; more than a kernel can hold is refused",
    )
    kv_dtype: Literal["compute", "int8"] = _field(
        "compute", "of cached keys and values; compute: that of train.dtype"
    )
    tensor: Count = _field(1, "devices that share heads and feed-forward width while decoding")
    attention: Literal["auto", "reference", "xla", "tpu", "gpu"] = _field(
        "auto", "over pages; see vibejax.attention"
    )


class RolloutConfig(SamplerConfig):
    """The groups of one step."""

    prompts_per_step: Count = _field(128, "prompts N drawn for one step")
    group_size: Annotated[int, Field(ge=2)] = _field(
        16, "completions G of a prompt, at least 2: advantages compare a group"
    )
    refills: Natural = _field(
        0, "times that groups without an advantage make way for others (DAPO's dynamic sampling)"
    )


class ObjectiveConfig(Section):
    """MGPO and what surrounds it (losses/mgpo.py, long2short.py, importance.py)."""

    gamma: NotNegative = _field(1.0, "sharpness of MGPO's prompt weights; 0 is GRPO")
    clip_low: Share = _field(0.2, "the ratio is clipped below 1 - clip_low")
    clip_high: Positive = _field(0.28, "the ratio is clipped above 1 + clip_high")
    updates: Count = _field(
        1, "optimizer updates on the prompts of a step; the report's RL is on-policy: 1"
    )
    aggregation: Literal["sequence", "token", "constant"] = _field(
        "sequence", "which mean over tokens the loss is: the report's, DAPO's or Dr. GRPO's"
    )
    long2short: NotNegative = _field(0.0, "lambda of Long2Short; the report's second stage: 0.2")
    mask_truncated: bool = _field(
        False, "leave completions that the limit ended out of the loss (DAPO's overlong filtering)"
    )
    kl: NotNegative = _field(0.0, "weight of the KL divergence to the starting policy")
    correction: Literal[
        "token_truncate",
        "token_mask",
        "sequence_truncate",
        "sequence_mask",
        "geometric_mask",
        "none",
    ] = _field("token_truncate", "how the sampler's mismatch is corrected (losses/importance.py)")
    correction_cap: Positive = _field(2.0, "largest weight of a truncating correction")
    correction_low: NotNegative = _field(0.5, "masking keeps ratios from here ...")
    correction_high: Positive = _field(2.0, "... to here")
    max_mean_dlogp: Positive = _field(
        0.1, "mean |sampler - trainer log-prob| in nats above which the run stops"
    )


class CodeVerifierConfig(Section):
    """How generated code is run."""

    allow_unsandboxed: bool = _field(
        False, "run code with limits alone where neither bubblewrap nor namespaces work"
    )


class VerifiersConfig(Section):
    """The worker processes that verify completions."""

    workers: Count = _field(2, "processes")
    limit_s: Positive = _field(10.0, "wall clock of one verification, in seconds")
    memory_mb: Count = _field(2_048, "address space of one process, in MiB")
    max_failure_rate: Share = _field(0.1, "share of verifications that may fail before a stop")
    code: CodeVerifierConfig = CodeVerifierConfig()

    def pool_arguments(self) -> dict[str, Any]:
        """What `verifiers.pool.Pool` takes."""
        return self.model_dump(exclude={"code"}) | {"settings": {"code": self.code.model_dump()}}


class EvalConfig(Section):
    """Held-out evaluation during training."""

    every: Natural = _field(
        0, "steps between evaluations; 0 evaluates only before the first and after the last"
    )
    prompts: Count = _field(512, "held-out prompts, the first of the file")
    samples: Count = _field(1, "completions of each")
    temperature: NotNegative = _field(1.0, "0 decodes greedily")
    top_p: Share = _field(1.0, "probability mass kept by nucleus sampling")


class SftEvalConfig(Section):
    """The loss on held-out documents during training."""

    every: Natural = _field(
        0, "steps between evaluations; 0 evaluates only before the first and after the last"
    )


class CheckpointConfig(Section):
    """What is kept to go on from."""

    every: Count = _field(20, "steps between checkpoints; the last step is always saved")
    keep: Count = _field(2, "newest checkpoints kept")
    keep_every: Natural = _field(
        0, "steps between checkpoints that are kept for good, a multiple of `every`; 0: none are"
    )

    @pydantic.model_validator(mode="after")
    def _divides(self):
        if self.keep_every % self.every:
            raise ValueError(
                f"keep_every = {self.keep_every} must be a multiple of every = {self.every}"
            )
        return self


class ProfileConfig(Section):
    """What the profiler records."""

    steps: list[Count] = _field([], "steps whose traces go to `profile` in the run folder")


class RlConfig(Section):
    """One reinforcement-learning stage."""

    policy: str = Field(description="MODEL to start from: HF folder, GGUF file or run folder")
    prompts: str = Field(description="training prompts, JSONL or parquet")
    heldout: str = _field("", "held-out prompts; empty: no evaluation")
    out: str = _field("", "run folder; empty: a fresh numbered one under runs/")
    resume: Resume = _field(
        False, "go on from the last checkpoint in `out`; auto: if there is a run, else begin it"
    )
    watchdog_s: NotNegative = _field(
        1_800.0,
        "seconds without a window, micro-batch, verdict or compiled program after which the "
        "process ends with an error, as hung; 0: never",
    )
    steps: Count = _field(1_000, "optimizer steps")
    seed: Natural = _field(0, "of the prompt order and of sampling")
    deterministic: bool = _field(
        False, "the same bits each time on GPUs too, more slowly; other devices give them anyway"
    )
    drop_solved: bool = _field(
        False, "before training, drop prompts whose group is all right or all wrong"
    )
    curriculum_steps: Natural = _field(
        0, "steps until all prompts are in use, the records' highest `accuracy` first; 0: at once"
    )
    samples_per_step: Natural = _field(4, "completions written to samples.jsonl each step")
    mesh: MeshConfig = MeshConfig()
    rollout: RolloutConfig = RolloutConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    attention: AttentionConfig = AttentionConfig()
    verifiers: VerifiersConfig = VerifiersConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    profile: ProfileConfig = ProfileConfig()

    @pydantic.model_validator(mode="after")
    def _fits(self):
        longest = self.rollout.max_prompt_tokens + self.rollout.max_completion_tokens
        if self.train.row_tokens < longest:
            raise ValueError(
                f"train.row_tokens = {self.train.row_tokens} must be at least "
                f"rollout.max_prompt_tokens + rollout.max_completion_tokens = {longest}"
            )
        if self.rollout.prompts_per_step % self.objective.updates:
            raise ValueError(
                f"objective.updates = {self.objective.updates} must divide "
                f"rollout.prompts_per_step = {self.rollout.prompts_per_step}"
            )
        return self


class EvaluationRolloutConfig(SamplerConfig):
    """How completions are sampled where a policy is judged by them."""

    temperature: NotNegative = _field(1.0, "divides the logits; 0 decodes greedily")
    top_p: Share = _field(0.95, "probability mass kept by nucleus sampling; the report's: 0.95")


class ProbeConfig(Section):
    """Scores of checkpoints on the probing sets of domains."""

    checkpoints: list[str] = Field(
        min_length=1,
        description="MODELs to score, in the order of their training; * matches folders",
    )
    domains: dict[Name, str] = Field(
        min_length=1, description="table of a probing set for each domain, JSONL or parquet"
    )
    out: str = _field("", "run folder; empty: a fresh numbered one under runs/")
    resume: Resume = _field(
        False, "go on in `out`; `checkpoints` and `domains` may differ, scores that it has stay"
    )
    seed: Natural = _field(0, "of sampling; all checkpoints get the same draws")
    samples: Count = _field(16, "completions of each prompt")
    k: Count = _field(8, "a domain's specialist has the highest pass@k; at most `samples`")
    dtype: Dtype = _field("float32", "of the computation")
    mesh: MeshConfig = MeshConfig()
    rollout: EvaluationRolloutConfig = EvaluationRolloutConfig()
    verifiers: VerifiersConfig = VerifiersConfig()

    @pydantic.model_validator(mode="after")
    def _fits(self):
        for name in self.checkpoints:
            if self.checkpoints.count(name) > 1:
                raise ValueError(f"checkpoints: {name!r} is named twice")
        if self.k > self.samples:
            raise ValueError(f"k = {self.k} must be at most samples = {self.samples}")
        return self


class EvaluationSetConfig(Section):
    """One evaluation set."""

    path: str = Field(description="JSONL, CSV or parquet, in its published layout or ours")
    samples: Natural = _field(0, "completions of each problem; 0: the stage's `samples`")


class EvaluateConfig(Section):
    """A checkpoint judged on evaluation sets."""

    policy: str = Field(description="MODEL to judge: HF folder, GGUF file or run folder")
    sets: dict[Annotated[str, Field(pattern="^[A-Za-z0-9_-]+$")], EvaluationSetConfig] = Field(
        min_length=1,
        description="table of NAME = {path = JSONL, CSV or parquet, samples = completions of each "
        "problem (0 or none: the stage's `samples`)}",
    )
    out: str = _field("", "run folder; empty: a fresh numbered one under runs/")
    resume: Resume = _field(False, "go on in `out` with what is not answered yet")
    seed: Natural = _field(0, "of sampling")
    samples: Count = _field(16, "completions of each problem, where a set does not say")
    dtype: Dtype = _field("float32", "of the computation")
    mesh: MeshConfig = MeshConfig()
    rollout: EvaluationRolloutConfig = EvaluationRolloutConfig()
    verifiers: VerifiersConfig = VerifiersConfig()


class ReplyConfig(Section):
    """How replies to questions about completions are sampled."""

    max_tokens: Count = _field(8_192, "longest reply, stop token included")
    temperature: NotNegative = _field(1.0, "divides the logits; 0 decodes greedily")
    top_p: Share = _field(0.95, "probability mass kept by nucleus sampling")


class ClrConfig(Section):
    """Answers chosen by the reliability of the claims behind them."""

    policy: str = Field(description="MODEL that answers and checks: HF folder, GGUF or run folder")
    prompts: str = Field(description="prompts with a final answer to verify, JSONL or parquet")
    questions: str = _field(
        "package:vibejax/clr_questions.toml", "TOML file of what is asked about completions"
    )
    out: str = _field("", "run folder; empty: a fresh numbered one under runs/")
    resume: Resume = _field(False, "go on in `out`, where `repeats` may differ")
    seed: Natural = _field(0, "of sampling; each repeat has draws of its own")
    samples: Count = _field(32, "completions K of each prompt")
    claims: Count = _field(5, "claims M of each completion")
    repeats: Count = _field(8, "times that all of it is done; the results are means over them")
    context: Natural = _field(
        0,
        "tokens of the longest sequence, questions about completions included; 0: "
        "rollout.max_prompt_tokens + rollout.max_completion_tokens, which is the least",
    )
    dtype: Dtype = _field("float32", "of the computation")
    mesh: MeshConfig = MeshConfig()
    rollout: EvaluationRolloutConfig = EvaluationRolloutConfig()
    extraction: ReplyConfig = ReplyConfig()
    checking: ReplyConfig = ReplyConfig()
    verifiers: VerifiersConfig = VerifiersConfig()

    @property
    def sequence_tokens(self) -> int:
        """Tokens of the longest sequence."""
        longest = self.rollout.max_prompt_tokens + self.rollout.max_completion_tokens
        return self.context or longest

    @pydantic.model_validator(mode="after")
    def _fits(self):
        longest = self.rollout.max_prompt_tokens + self.rollout.max_completion_tokens
        if self.sequence_tokens < longest:
            raise ValueError(
                f"context = {self.context} must be 0 or at least rollout.max_prompt_tokens + "
                f"rollout.max_completion_tokens = {longest}"
            )
        return self


class SftConfig(Section):
    """One supervised fine-tuning stage."""

    policy: str = _field("", "MODEL to start from; empty: random weights of the sizes in `model`")
    tokenizer: str = _field("", "folder of the tokenizer, where the weights are random")
    data: str = Field(description="JSONL or parquet of messages, or of prompt and completion")
    heldout: str = _field("", "held-out documents, as `data`; empty: no evaluation")
    out: str = _field("", "run folder; empty: a fresh numbered one under runs/")
    resume: Resume = _field(
        False, "go on from the last checkpoint in `out`; auto: if there is a run, else begin it"
    )
    watchdog_s: NotNegative = _field(
        1_800.0,
        "seconds without a window, micro-batch, verdict or compiled program after which the "
        "process ends with an error, as hung; 0: never",
    )
    epochs: NotNegative = _field(0.0, "passes over `data`, in place of `steps`")
    steps: Natural = _field(0, "optimizer steps, in place of `epochs`")
    documents_per_step: Count = _field(
        128, "documents of one step; its loss is the mean over all their learnt tokens"
    )
    long_documents: Literal["error", "drop", "truncate"] = _field(
        "error", "what becomes of a document longer than train.row_tokens or the model's context"
    )
    context: Natural = _field(
        0, "positions of the trained model, written into its config.json; 0: the policy's"
    )
    seed: Natural = _field(0, "of the weights and the document order")
    deterministic: bool = _field(
        False, "the same bits each time on GPUs too, more slowly; other devices give them anyway"
    )
    export_dtype: Literal["float32", "bfloat16", "float16"] = _field(
        "bfloat16", "of the weights in `out`/final and `out`/exports"
    )
    export_every: Natural = _field(
        0, "steps between HF folders in `out`/exports, for probing, the last one's too; 0: none"
    )
    model: ModelSizes = ModelSizes()
    mesh: MeshConfig = MeshConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    attention: AttentionConfig = AttentionConfig()
    eval: SftEvalConfig = SftEvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    profile: ProfileConfig = ProfileConfig()

    @pydantic.model_validator(mode="after")
    def _has_a_start(self):
        if not self.policy and not self.tokenizer:
            raise ValueError("policy = '' must name a MODEL, or tokenizer a folder")
        return self

    @pydantic.model_validator(mode="after")
    def _has_a_length(self):
        if bool(self.epochs) == bool(self.steps):
            raise ValueError(
                f"epochs = {self.epochs:g}, steps = {self.steps}: one of the two must be above 0"
            )
        return self


class TaughtDomain(Section):
    """What is taught of one domain, and by whom."""

    teachers: list[str] = Field(
        min_length=1, description="MODELs, each of which completes all the prompts"
    )
    prompts: str = Field(description="prompts with their ground truth, JSONL or parquet")


class SelectionConfig(Section):
    """Which traces are learnt (losses/distillation.py); the report publishes none of the values."""

    min_tokens: Natural = _field(64, "a shorter trace is not scored")
    short_quantile: Annotated[float, Field(ge=0, lt=1)] = _field(
        0.01, "share of a domain's traces, the shortest, that is not scored either"
    )
    edges: list[Count] = _field(
        [2_048, 4_096, 8_192, 16_384, 32_768],
        "tokens at which the next length bucket begins, rising; empty: a domain is one cell",
    )
    min_cell: Count = _field(8, "a cell of fewer scored traces is left out: nothing ranks there")
    deviations: Positive = _field(
        5.0, "a score is an outlier so many median absolute deviations above its cell's median"
    )
    low: Annotated[float, Field(ge=0, lt=1)] = _field(
        0.4, "quantile of a cell's scores, without outliers, from which traces are chosen ..."
    )
    high: Share = _field(1.0, "... up to this one")
    shares: dict[Name, Positive] = _field(
        {}, "table of each domain's part of the chosen set, relative; empty: as they come"
    )

    @pydantic.model_validator(mode="after")
    def _rises(self):
        if self.edges != sorted(set(self.edges)):
            raise ValueError(f"edges = {self.edges} must rise")
        if self.low >= self.high:
            raise ValueError(f"low = {self.low} must be below high = {self.high}")
        return self


class DistillConfig(Section):
    """Traces of teachers from which a student learns most."""

    student: str = Field(description="MODEL that is to learn, and scores the traces")
    domains: dict[Name, TaughtDomain] = Field(
        min_length=1, description="table of a table for each domain"
    )
    out: str = _field("", "run folder; empty: a fresh numbered one under runs/")
    resume: Resume = _field(
        False, "go on in `out`; `domains` and `selection` may differ, samples and scores stay"
    )
    seed: Natural = _field(0, "of sampling, and of what goes beyond a domain's share")
    samples: Count = _field(8, "completions of each prompt by each of its teachers")
    mesh: MeshConfig = MeshConfig()
    rollout: EvaluationRolloutConfig = EvaluationRolloutConfig()
    train: TrainConfig = TrainConfig()
    attention: AttentionConfig = AttentionConfig()
    verifiers: VerifiersConfig = VerifiersConfig()
    selection: SelectionConfig = SelectionConfig()

    @pydantic.model_validator(mode="after")
    def _fits(self):
        for domain, taught in self.domains.items():
            for name in taught.teachers:
                if taught.teachers.count(name) > 1:
                    raise ValueError(f"domains.{domain}.teachers: {name!r} is named twice")
        shares = self.selection.shares
        if shares and shares.keys() != self.domains.keys():
            raise ValueError(
                f"selection.shares names {', '.join(shares)}: must name all of domains "
                f"({', '.join(self.domains)}), or none"
            )
        longest = self.rollout.max_prompt_tokens + self.rollout.max_completion_tokens
        if self.train.row_tokens < longest:
            raise ValueError(
                f"train.row_tokens = {self.train.row_tokens} must be at least "
                f"rollout.max_prompt_tokens + rollout.max_completion_tokens = {longest}"
            )
        return self


class DecontaminateConfig(Section):
    """What records must not repeat (curate/evaluation.py)."""

    sets: list[str] = _field(
        [], "evaluation sets, JSONL or parquet: paths, or NAME=PATH; empty: no decontamination"
    )
    field: str = _field("", "the sets' field of the problem; empty: `messages` or `prompt`")
    n: Count = _field(10, "words of an n-gram")
    share: Share = _field(
        0.5, "of an item's words in shared n-grams that makes a copy, n at least; 4 n always do"
    )


class LengthConfig(Section):
    """How long prompts and traces may be; the report's second SFT stage: min_trace = 5000."""

    tokenizer: str = _field("", "MODEL whose tokens are counted; empty: characters")
    min_prompt: Natural = _field(1, "a shorter prompt is dropped")
    max_prompt: Natural = _field(0, "a longer prompt is dropped; 0: none is")
    min_trace: Natural = _field(0, "a shorter trace is dropped")
    max_trace: Natural = _field(0, "a longer trace is dropped; 0: none is")


class RepetitionConfig(Section):
    """How much traces may repeat themselves and each other (curate/repetition.py)."""

    max_share: Share = _field(
        0.3, "of a trace's n-grams of 48 letters that stood before in it; 1: no repetition filter"
    )
    max_count: Count = _field(10, "times that one of them may stand in a trace")
    max_template_share: Share = _field(
        0.8, "of a trace in lines that stood in template_records others; 1: no template filter"
    )
    template_records: Count = _field(100, "records after which a line is a template")


class DuplicatesConfig(Section):
    """Which records count as there before (curate/duplicates.py)."""

    exact: bool = _field(True, "drop records with the letters and formulas of an earlier one")
    near: Annotated[float, Field(ge=0, le=1)] = _field(
        0.85, "share of n-grams that makes two with the same formulas nearly the same; 0: none are"
    )


class RolloutFilterConfig(Section):
    """What is made of a record's `accuracy`, or of its `completions` (curate/rollouts.py)."""

    keep: Literal["all", "hard", "mixed"] = _field(
        "all", "hard: error rate >= min_error_rate, for SFT; mixed: accuracy not 0 or 1, for RL"
    )
    min_error_rate: Share = _field(0.75, "of the completions, for keep = hard")
    pseudo_labels: bool = _field(
        False, "give records without a ground truth the answer of most of their completions"
    )
    min_votes: Share = _field(0.5, "of the completions that the answer needs")


class CurateConfig(Section):
    """What is dropped from raw records."""

    inputs: list[str] = Field(description="records, JSONL or parquet")
    out: str = Field(description="where kept records go, .jsonl or .parquet")
    workers: Count = _field(2, "processes that look at records; 1: no others than this one")
    verify_traces: bool = _field(False, "drop traces that their verifiers do not accept")
    decontaminate: DecontaminateConfig = DecontaminateConfig()
    length: LengthConfig = LengthConfig()
    repetition: RepetitionConfig = RepetitionConfig()
    duplicates: DuplicatesConfig = DuplicatesConfig()
    rollouts: RolloutFilterConfig = RolloutFilterConfig()
    verifiers: VerifiersConfig = VerifiersConfig()


class StageConfig(Section):
    """One stage of a pipeline."""

    name: Annotated[str, Field(pattern="^[A-Za-z0-9_-]+$")] = Field(
        description="of its folder in the pipeline's; later stages write {name} for that folder"
    )
    run: str = Field(description="the command, as in python -m vibejax.COMMAND")
    config: str = _field("", "its configuration, beside the pipeline's; empty: `set` says all")
    set: dict[str, Any] = Field(
        default={}, description="fields that differ from `config` and the pipeline's `defaults`"
    )
    arguments: list[str] = Field(
        default=[], description="of a command that has no configuration; {out} is its own folder"
    )
    evaluate: bool = _field(False, "evaluate the model that comes out")


class PipelineConfig(Section):
    """Stages in their order."""

    out: str = Field(description="folder of all stages")
    stages: list[StageConfig] = Field(min_length=1, description="array of tables, see below")
    defaults: dict[str, dict[str, Any]] = Field(
        default={}, description="command -> fields of all its stages; `evaluate` names the sets"
    )
