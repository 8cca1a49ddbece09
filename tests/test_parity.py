"""dsjax against transformers 5 and torch, through recorded answers.

Float32 logits agree to 1e-4, chosen experts exactly. The checkpoints are made on the
spot (reference/checkpoints.py); reference/make_golden.py recorded the answers.
test_parity_live.py compares with the living reference.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import dsjax
from dsjax.nn.transformer import Transformer
from tests.reference import checkpoints, files, golden, routing
from tests.reference.cases import CASES
from tests.reference.checkpoints import Case
from tests.reference.mutations import MUTATIONS, Mutation
from tests.reference.observe import decode, largest, logits, observe

TOLERANCE = 1e-4
WITH_EXPERTS = [name for name, case in CASES.items() if case.moe_layers]


@dataclass
class Loaded:
    """One case: the checkpoint on disk, read by dsjax, and the recorded answers."""

    case: Case
    directory: Path
    model: Transformer
    golden: golden.Golden

    @property
    def tokens(self) -> np.ndarray:
        return checkpoints.tokens(self.case)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Case name -> Loaded, each loaded once."""
    done: dict[str, Loaded] = {}

    def get(name: str) -> Loaded:
        if name not in done:
            directory = tmp_path_factory.mktemp(name) / "checkpoint"
            checkpoints.write(CASES[name], directory)
            model = dsjax.load(directory, dtype="float32")
            done[name] = Loaded(CASES[name], directory, model, golden.load(name))
        return done[name]

    return get


# --- dsjax gives the recorded answers


@pytest.mark.parametrize("name", CASES)
def test_logits(name, load):
    loaded = load(name)
    found = logits(loaded.model, loaded.tokens)
    assert found.dtype == np.float32
    assert found.shape == (*loaded.tokens.shape, loaded.case.config["vocab_size"])
    at = loaded.golden["positions"]
    assert largest(found[:, at] - loaded.golden["logits"]) <= TOLERANCE
    assert 0.5 < found.std() < 2


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_chosen_experts_and_mtp(name, load):
    loaded = load(name)
    recorded = loaded.golden
    observed = observe(loaded.model, loaded.tokens)
    np.testing.assert_array_equal(observed.indices, recorded["indices"])
    assert (observed.mtp_logits is not None) == bool(loaded.case.num_mtp)
    if observed.mtp_logits is None:
        return
    at = golden.mtp_positions(loaded.tokens.shape[1])
    difference = largest(observed.mtp_logits[:, at] - recorded["mtp_logits"])
    assert difference <= TOLERANCE
    assert 0.5 < observed.mtp_logits.std() < 2
    np.testing.assert_array_equal(observed.mtp_indices, recorded["mtp_indices"][0])


@pytest.mark.parametrize("name", ["llama_gqa", "deepseek_v3"])
def test_logits_by_the_cache(name, load):
    """Absorbed attention, too, has YaRN's scales and the right rotation."""
    loaded, prompt = load(name), 20
    found = decode(loaded.model, loaded.tokens, prompt)
    at = loaded.golden["positions"]
    after = at >= prompt
    difference = found[:, at[after] - prompt] - loaded.golden["logits"][:, after]
    assert after.sum() > 5
    assert largest(difference) <= TOLERANCE


@pytest.mark.parametrize(
    "name, dtype",
    [("deepseek_v3", None), ("qwen2_tied", None), ("deepseek_v3_fp8", "float32")],
)
def test_converted_checkpoint_gives_the_same_bits(name, dtype, load, tmp_path):
    """Converted as stored; FP8 to float32, since bfloat16, its default, would round."""
    loaded = load(name)
    dsjax.checkpoint.convert(loaded.directory, tmp_path / "orbax", dtype=dtype)
    again = dsjax.load(tmp_path / "orbax", dtype="float32")
    before, after = (logits(model, loaded.tokens) for model in (loaded.model, again))
    np.testing.assert_array_equal(after, before)


# --- Mistakes show: dsjax on checkpoints edited to act like one. Through torch,
# test_parity_live.py shows all of them.

SHOWN = [
    "llama_gqa-no_rope_scaling",
    "deepseek_v2-half-split_rotation",
    "deepseek_v3-mscale_not_in_the_softmax_scale",
    "deepseek_v3-bias_ignored",
    "deepseek_v3-eh_proj_inputs_swapped",
    "deepseek_v3_fp8_small_blocks-columns_of_blocks_reversed",
]


@pytest.mark.parametrize("shown", SHOWN)
def test_mistake_moves_the_logits(shown, tmp_path):
    mutation = find_mutation(shown)
    model = dsjax.load(mutation.write(tmp_path / "checkpoint"), dtype="float32")
    tokens = checkpoints.tokens(CASES[mutation.case])
    recorded = golden.load(mutation.case)
    if mutation.mtp:
        at = golden.mtp_positions(tokens.shape[1])
        difference = observe(model, tokens).mtp_logits[:, at] - recorded["mtp_logits"]
    else:
        at = recorded["positions"]
        difference = logits(model, tokens)[:, at] - recorded["logits"]
    assert largest(difference) > 1000 * TOLERANCE


def find_mutation(name: str) -> Mutation:
    [mutation] = [mutation for mutation in MUTATIONS if str(mutation) == name]
    return mutation


# --- The recorded answers are fit to judge by


@pytest.mark.parametrize("name", CASES)
def test_checkpoint_is_the_one_that_was_recorded(name, tmp_path):
    directory = checkpoints.write(CASES[name], tmp_path / name)
    assert files.digest(directory) == str(golden.load(name)["digest"]), (
        "the checkpoint changed: run python -m tests.reference.make_golden"
    )


@pytest.mark.parametrize("name", CASES)
def test_reference_is_exact_enough(name):
    """Its float32 error is small, and no choice of experts hangs on rounding."""
    answers = golden.load(name)
    assert answers["float32_error"] < TOLERANCE / 3
    assert golden.narrowest_margin(CASES[name], answers) > 5e-5


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_every_expert_and_so_every_group_is_used(name):
    case = CASES[name]
    for _, indices, _ in golden.routers(case, golden.load(name)):
        count = case.config["n_routed_experts"]
        assert np.bincount(indices.ravel(), minlength=count).min() > 0


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_choices_tell_routing_mistakes_apart(name):
    """Routing in numpy repeats the recorded choices; each possible mistake does not."""
    case = CASES[name]
    for seen, indices, bias in golden.routers(case, golden.load(name)):
        chosen = routing.choose(seen, case.config, bias)
        np.testing.assert_array_equal(chosen, indices)
        for mistake in possible_mistakes(case):
            wrong = routing.choose(seen, case.config, bias, mistake)
            assert (wrong != indices).any(-1).sum() >= 5, mistake


def possible_mistakes(case: Case) -> set[routing.Mistake]:
    """The routing mistakes that can make a difference to `case`."""
    mistakes = {routing.Mistake.FIRST_EXPERTS}
    if case.config.get("n_group", 1) > 1:
        mistakes |= {routing.Mistake.NO_GROUPS, routing.Mistake.OTHER_GROUP_SCORE}
    if case.config.get("topk_method") == "noaux_tc":
        mistakes |= {routing.Mistake.NO_BIAS, routing.Mistake.MASK_WITH_ZERO}
    return mistakes
