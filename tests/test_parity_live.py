"""dsjax against the living reference, where torch and transformers 5 are installed.

Beyond the recorded cases: all positions, checkpoints as transformers 5 writes them, the
references against each other, and every listed mistake seen to move the logits.
"""

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5")

import dsjax  # noqa: E402
from tests.reference import (  # noqa: E402
    checkpoints,
    files,
    golden,
    torch_models,
    torch_mtp,
)
from tests.reference.cases import CASES  # noqa: E402
from tests.reference.mutations import MUTATIONS  # noqa: E402
from tests.reference.observe import largest, logits, observe  # noqa: E402

TOLERANCE = 1e-4
WITH_EXPERTS = [name for name, case in CASES.items() if case.moe_layers]


@pytest.fixture(scope="module", autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Case name -> (directory, torch model, its answers, MTP's answers or None)."""
    done = {}

    def get(name: str):
        if name not in done:
            case = CASES[name]
            directory = tmp_path_factory.mktemp(name) / "checkpoint"
            checkpoints.write(case, directory)
            done[name] = directory, *run(directory, checkpoints.tokens(case))
        return done[name]

    return get


def run(directory, tokens):
    """The torch model of a checkpoint, its answers, and MTP's or None."""
    model = torch_models.load(directory)
    main = torch_models.forward(model, tokens)
    if not files.read(directory)[0].get("num_nextn_predict_layers"):
        return model, main, None
    module = torch_mtp.load(directory, model)
    return model, main, torch_mtp.forward(model, module, main.hidden, tokens)


@pytest.mark.parametrize("name", CASES)
def test_dsjax_agrees_everywhere(name, answers):
    directory, _, main, mtp = answers(name)
    tokens = checkpoints.tokens(CASES[name])
    model = dsjax.load(directory, dtype="float32")
    agrees(model, tokens, main, mtp)


def test_dsjax_agrees_on_a_mesh(answers):
    """FP8 weights read in parts, experts apart."""
    directory, _, main, mtp = answers("deepseek_v3_fp8")
    mesh = dsjax.make_mesh(fsdp=2, expert=4)
    model = dsjax.load(directory, dtype="float32", mesh=mesh)
    agrees(model, checkpoints.tokens(CASES["deepseek_v3_fp8"]), main, mtp)


def agrees(model, tokens, main, mtp):
    """Logits to the tolerance and choices exactly, MTP's included."""
    assert largest(logits(model, tokens) - main.logits) <= TOLERANCE
    if not main.indices:
        return
    observed = observe(model, tokens)
    np.testing.assert_array_equal(observed.indices, np.stack(main.indices))
    if mtp is not None:
        assert largest(observed.mtp_logits - mtp.logits) <= TOLERANCE
        np.testing.assert_array_equal(observed.mtp_indices, mtp.indices[0])


def _rope_scaling(**changes):
    return CASES["deepseek_v3"].config["rope_scaling"] | changes


SETTINGS = {  # that no published config.json has, but transformers reads
    "v3_plain_queries": (
        "deepseek_v3",
        {"q_lora_rank": None, "rope_interleave": False, "rms_norm_eps": 1e-3},
    ),
    "v3_no_groups": (
        "deepseek_v3",
        {"n_group": 1, "topk_group": 1, "norm_topk_prob": False, "rope_scaling": None},
    ),
    "v3_unequal_mscales": (
        "deepseek_v3",
        {"rope_scaling": _rope_scaling(mscale=0.707), "n_shared_experts": 2},
    ),
    "v3_all_moe_tied": (
        "deepseek_v3",
        {
            "first_k_dense_replace": 0,
            "num_hidden_layers": 2,
            "tie_word_embeddings": True,
            "num_nextn_predict_layers": 0,
        },
    ),
    "v2_greedy": (
        "deepseek_v2",
        {"topk_method": "greedy", "n_group": None, "topk_group": None},
    ),
    "llama_head_dim": ("llama_gqa", {"head_dim": 20, "tie_word_embeddings": True}),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_other_settings(setting, tmp_path):
    name, changes = SETTINGS[setting]
    case = replace(CASES[name], config=CASES[name].config | changes)
    tokens = checkpoints.tokens(case)
    directory = checkpoints.write(case, tmp_path / setting)
    _, main, mtp = run(directory, tokens)
    agrees(dsjax.load(directory, dtype="float32"), tokens, main, mtp)


@pytest.mark.parametrize("name", CASES)
def test_recorded_answers_are_todays(name, answers):
    _, _, main, mtp = answers(name)
    recorded = golden.load(name)
    at = recorded["positions"]
    assert largest(main.logits[:, at] - recorded["logits"]) <= TOLERANCE / 3
    if mtp is not None:
        at = golden.mtp_positions(main.logits.shape[1])
        assert largest(mtp.logits[:, at] - recorded["mtp_logits"]) <= TOLERANCE / 3


@pytest.mark.parametrize(
    "name", [name for name in CASES if name != "deepseek_moe"]
)  # which transformers cannot write
def test_checkpoint_as_transformers_writes_it(name, answers, tmp_path):
    """config.json has `rope_parameters`; a V3 checkpoint comes without its MTP layer."""
    _, torch_model, main, _ = answers(name)
    torch_model.save_pretrained(tmp_path / "checkpoint")
    config, stored = files.read(tmp_path / "checkpoint")
    assert "rope_parameters" in config and "rope_scaling" not in config
    assert not any(".eh_proj." in tensor for tensor in stored)
    model = dsjax.load(tmp_path / "checkpoint", dtype="float32")
    assert not model.config.mtp
    tokens = checkpoints.tokens(CASES[name])
    assert largest(logits(model, tokens) - main.logits) <= TOLERANCE


@pytest.mark.parametrize("name", ["llama_gqa", "qwen2_tied", *WITH_EXPERTS])
def test_exported_checkpoint_means_the_same_to_torch(name, answers, tmp_path):
    """Published -> Orbax -> published again: transformers sees no difference."""
    directory, _, main, mtp = answers(name)
    dsjax.checkpoint.convert(directory, tmp_path / "orbax", dtype="float32")
    dsjax.checkpoint.export(tmp_path / "orbax", tmp_path / "exported")
    tokens = checkpoints.tokens(CASES[name])
    _, main_again, mtp_again = run(tmp_path / "exported", tokens)
    np.testing.assert_array_equal(main_again.logits, main.logits)
    if mtp is not None:
        np.testing.assert_array_equal(mtp_again.logits, mtp.logits)


# --- The references themselves


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_mistake_moves_the_logits(mutation, answers, tmp_path):
    _, _, main, mtp = answers(mutation.case)
    tokens = checkpoints.tokens(CASES[mutation.case])
    _, wrong, wrong_mtp = run(mutation.write(tmp_path / "edited"), tokens)
    if mutation.mtp:
        np.testing.assert_array_equal(wrong.logits, main.logits)
        main, wrong = mtp, wrong_mtp
    assert largest(wrong.logits - main.logits) > 1000 * TOLERANCE


def test_weights_from_biased_affinities_would_show(answers):
    """The bias may only choose: one of V3's traps that no edit of a checkpoint makes."""
    _, model, main, _ = answers("deepseek_v3")

    def biased(router, _, output):
        seen, weights, indices = output
        scores = (seen.sigmoid() + router.e_score_correction_bias).gather(1, indices)
        share = scores / scores.sum(-1, keepdim=True)
        return seen, share * weights.sum(-1, keepdim=True), indices

    hooks = [
        router.register_forward_hook(biased) for router in torch_models.routers(model)
    ]
    wrong = torch_models.forward(model, checkpoints.tokens(CASES["deepseek_v3"]))
    for hook in hooks:
        hook.remove()
    assert largest(wrong.logits - main.logits) > 1000 * TOLERANCE


def test_mtp_reference_is_transformers_drafting(answers):
    """transformers' own MTP model, which takes one sequence, gives the same logits."""
    from transformers.cache_utils import MtpCache
    from transformers.modeling_layers import MtpModel

    directory, _, main, mtp = answers("deepseek_v3")
    model = torch_models.load(directory)
    layer = model.config.num_hidden_layers  # it expects 61, whatever the config says
    model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{layer}\..*"]
    drafting = MtpModel.from_pretrained(model)
    following = torch.from_numpy(checkpoints.tokens(CASES["deepseek_v3"])[:1, 1:])
    with torch.no_grad():
        hidden = drafting.forward_layer(
            0,
            main.hidden[:1, :-1],
            torch.arange(1, following.shape[1] + 1)[None],
            MtpCache(config=model.config.get_mtp_config()),
            input_ids=following.long(),
        )
        drafted = drafting.shared_head(hidden).numpy()
    assert largest(drafted - mtp.logits[:1]) <= TOLERANCE / 3


def test_mtp_state_before_and_after_the_norm_differ(answers):
    directory, model, main, mtp = answers("deepseek_v3")
    tokens = checkpoints.tokens(CASES["deepseek_v3"])
    module = torch_mtp.load(directory, model)
    other = torch_mtp.forward(model, module, main.residual, tokens)
    assert largest(other.logits - mtp.logits) > 1000 * TOLERANCE
