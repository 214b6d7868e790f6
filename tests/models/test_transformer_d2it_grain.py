# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""The grain model: conditions that matter, images that do not, and maps it can learn."""

import math

import pytest
import torch
from diffusers import DDIMScheduler
from peft import LoraConfig

from diffusers_d2it import D2iTGrainModel, load_preset, region_entropy
from diffusers_d2it.grains import grain_map_from_entropy
from diffusers_d2it.losses import grain_loss


KINDS = pytest.mark.parametrize("num_grains", [2, 3])


def inputs(num_grains: int = 2, batch: int = 3, height: int = 4, width: int = 6, seed: int = 0) -> dict:
    """A noised map that is not square, and a timestep, a label and a ratio of its own for every image."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, num_grains, height, width, generator=generator),
        "timestep": torch.tensor([10, 500, 999, 3])[:batch],
        "class_labels": torch.tensor([0, 9, 10, 4])[:batch],  # 10 is "no class"
        "fine_ratio": torch.tensor([0.3, math.nan, 1.0, 0.0])[:batch],
    }


def row(arguments: dict, index: int) -> dict:
    return {name: value[index : index + 1] for name, value in arguments.items()}


# ---- Output ----


@KINDS
@torch.no_grad()
def test_there_is_a_logit_for_every_grain_of_every_region(make_grain_model, num_grains):
    model = make_grain_model(num_grains)
    arguments = inputs(num_grains)
    logits = model(**arguments).logits
    assert logits.shape == (3, num_grains, 4, 6)
    assert logits.std() > 0
    assert torch.equal(model(**arguments, return_dict=False)[0], logits)


@KINDS
@torch.no_grad()
def test_before_training_every_grain_is_equally_likely(make_grain_model, num_grains):
    logits = make_grain_model(num_grains, randomize=False)(**inputs(num_grains)).logits
    assert torch.equal(logits.softmax(dim=1), torch.full_like(logits, 1 / num_grains))


@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch_mates(make_grain_model):
    model = make_grain_model()
    arguments = inputs()
    logits = model(**arguments).logits
    others = {name: torch.cat([value[:1], value.flip(0)]) for name, value in inputs(seed=1).items()}
    for index in range(3):
        mine = row(arguments, index)
        mixed = {name: torch.cat([value, mine[name]]) for name, value in others.items()}
        torch.testing.assert_close(model(**mine).logits, logits[index : index + 1], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(model(**mixed).logits[-1:], logits[index : index + 1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["hidden_states", "timestep", "class_labels", "fine_ratio"])
@torch.no_grad()
def test_every_condition_changes_the_output_of_its_image_only(make_grain_model, name):
    model = make_grain_model()
    arguments = inputs()
    changed = arguments[name].clone()
    changed[0] = {"hidden_states": -changed[0], "timestep": 900, "class_labels": 5, "fine_ratio": 0.8}[name]
    before = model(**arguments).logits
    after = model(**(arguments | {name: changed})).logits
    assert (after[0] - before[0]).abs().max() > 1e-3
    torch.testing.assert_close(after[1:], before[1:], rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_a_region_sees_the_whole_map(make_grain_model):
    """Attention is global: the far corner changes every region, however little."""
    model = make_grain_model().double()
    arguments = inputs(batch=1)
    arguments["hidden_states"] = arguments["hidden_states"].double()
    changed = arguments["hidden_states"].clone()
    changed[..., -1, -1] += 1
    difference = model(**(arguments | {"hidden_states": changed})).logits - model(**arguments).logits
    assert (difference.abs().amax(dim=1) > 0).all()


def silence_blocks(model: D2iTGrainModel) -> D2iTGrainModel:
    """Close the gates of all blocks, so that every token goes its own way from the state to the logits."""
    for block in model.transformer_blocks:
        torch.nn.init.zeros_(block.adaln.weight)
        torch.nn.init.zeros_(block.adaln.bias)
    return model


@torch.no_grad()
def test_logits_stand_at_the_region_of_their_token(make_grain_model):
    model = silence_blocks(make_grain_model())
    arguments = inputs()
    changed = arguments["hidden_states"].clone()
    changed[1, :, 1, 4] += 1
    difference = model(**(arguments | {"hidden_states": changed})).logits - model(**arguments).logits
    assert difference.abs().amax(dim=1).nonzero().tolist() == [[1, 1, 4]]


@torch.no_grad()
def test_the_place_of_a_region_is_its_row_and_column_whatever_the_size_of_the_map(make_grain_model):
    """Tokens that do not look at one another: a window of a map is the map of the window at the top left."""
    model = silence_blocks(make_grain_model())
    large = inputs(height=7, width=8)
    for height, width in ((4, 6), (6, 4), (7, 3)):
        small = large | {"hidden_states": large["hidden_states"][..., :height, :width]}
        torch.testing.assert_close(model(**small).logits, model(**large).logits[..., :height, :width])


@torch.no_grad()
def test_regions_know_where_they_are(make_grain_model):
    """On a constant state only the positions tell regions apart; rows are not columns."""
    arguments = inputs(batch=1, height=4, width=4)
    arguments["hidden_states"] = torch.ones(1, 2, 4, 4)
    logits = make_grain_model()(**arguments).logits
    regions = logits.flatten(2)[0].T  # (16, 2)
    distance = torch.cdist(regions, regions) + torch.eye(16)
    assert distance.min() > 1e-6
    assert not torch.allclose(logits, logits.transpose(-1, -2), atol=1e-5)


@torch.no_grad()
def test_a_scalar_timestep_is_the_same_for_every_image(make_grain_model):
    model = make_grain_model()
    arguments = inputs()
    expected = model(**(arguments | {"timestep": torch.tensor([500, 500, 500])})).logits
    for timestep in (500, 500.0, torch.tensor(500), torch.tensor([500])):
        assert torch.equal(model(**(arguments | {"timestep": timestep})).logits, expected)


@torch.no_grad()
def test_nan_and_none_leave_the_ratio_open(make_grain_model):
    model = make_grain_model()
    arguments = inputs()
    open_ratio = torch.full((3,), math.nan)
    left_open = model(**(arguments | {"fine_ratio": None})).logits
    assert torch.equal(model(**(arguments | {"fine_ratio": open_ratio})).logits, left_open)
    mixed = model(**arguments).logits  # the second image has NaN
    torch.testing.assert_close(mixed[1], left_open[1])
    assert (mixed[0] - left_open[0]).abs().max() > 1e-3
    zero = model(**(arguments | {"fine_ratio": torch.zeros(3)})).logits
    assert (zero - left_open).abs().amax(dim=(1, 2, 3)).min() > 1e-3  # a ratio of 0 is a ratio


@torch.no_grad()
def test_an_unconditional_model_takes_no_labels_and_draws_on_the_rest(make_grain_model):
    model = make_grain_model(num_classes=None)
    arguments = inputs()
    labels = arguments.pop("class_labels")
    assert model(**arguments).logits.shape == (3, 2, 4, 6)
    assert not any("label_embed" in name for name, _ in model.named_parameters())
    with pytest.raises(ValueError, match="unconditional"):
        model(**arguments, class_labels=labels)


@torch.no_grad()
def test_a_model_without_the_ratio_condition_has_no_weights_for_it(make_grain_model):
    model = make_grain_model(fine_ratio_condition=False)
    arguments = inputs()
    ratio = arguments.pop("fine_ratio")
    assert model(**arguments).logits.shape == (3, 2, 4, 6)
    assert not any("fine_ratio" in name for name, _ in model.named_parameters())
    with pytest.raises(ValueError, match="fine_ratio_condition=False"):
        model(**arguments, fine_ratio=ratio)


# ---- States ----


@KINDS
def test_the_state_of_a_map_is_plus_one_at_its_grain_and_minus_one_elsewhere(num_grains):
    grain_map = torch.randint(num_grains, (2, 3, 5), generator=torch.Generator().manual_seed(0))
    state = D2iTGrainModel.state_from_grain_map(grain_map, num_grains)
    assert state.shape == (2, num_grains, 3, 5) and state.dtype == torch.float32
    assert torch.equal(state.argmax(dim=1), grain_map)
    assert torch.equal((state == 1).sum(dim=1), torch.ones_like(grain_map))
    assert torch.equal((state == -1).sum(dim=1), torch.full_like(grain_map, num_grains - 1))


@KINDS
def test_the_expected_state_of_certain_logits_is_the_state_of_their_map(num_grains):
    grain_map = torch.randint(num_grains, (2, 3, 5), generator=torch.Generator().manual_seed(0))
    state = D2iTGrainModel.state_from_grain_map(grain_map, num_grains)
    torch.testing.assert_close(D2iTGrainModel.expected_state(100 * state), state)


@KINDS
def test_the_expected_state_is_the_mean_over_the_grains(num_grains):
    logits = torch.randn(2, num_grains, 3, 5, generator=torch.Generator().manual_seed(0))
    mean = torch.zeros_like(logits)
    for grain in range(num_grains):
        state = D2iTGrainModel.state_from_grain_map(torch.full((2, 3, 5), grain), num_grains)
        mean += logits.softmax(dim=1)[:, grain : grain + 1] * state
    torch.testing.assert_close(D2iTGrainModel.expected_state(logits), mean)


# ---- Training ----


@KINDS
def test_every_parameter_gets_a_gradient_when_some_ratios_are_open(make_grain_model, num_grains):
    model = make_grain_model(num_grains).train()
    arguments = inputs(num_grains)
    grain_map = torch.randint(num_grains, (3, 4, 6), generator=torch.Generator().manual_seed(0))
    grain_loss(model(**arguments).logits, grain_map)["loss"].backward()
    without = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.isfinite().all() or parameter.grad.abs().max() < 1e-12
        # a bias of all keys shifts all scores of a query alike, so its gradient is zero in every attention
        if not name.endswith("to_k.bias")
    ]
    assert without == []
    labels = model.label_embed.weight.grad.abs().sum(dim=1) > 0
    assert labels.nonzero().flatten().tolist() == [0, 9, 10]


def test_a_fresh_model_starts_to_learn_from_its_zero_output(make_grain_model):
    """adaLN-Zero and the zero output layer block most gradients at first, but not the way out."""
    model = make_grain_model(randomize=False).train()
    grain_loss(model(**inputs()).logits, torch.ones(3, 4, 6, dtype=torch.int64))["loss"].backward()
    assert model.norm_out.proj_out.weight.grad.abs().max() > 0


@KINDS
def test_gradient_checkpointing_changes_neither_output_nor_gradients(make_grain_model, num_grains):
    results = []
    for checkpointing in (False, True):
        model = make_grain_model(num_grains).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
            assert model.is_gradient_checkpointing
        logits = model(**inputs(num_grains)).logits
        logits.pow(2).sum().backward()
        results.append((logits.detach(), {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(results[1], results[0])


def test_checkpointed_blocks_are_run_again_in_the_backward_pass(make_grain_model):
    model = make_grain_model().train()
    model.enable_gradient_checkpointing()
    calls = []
    model.transformer_blocks[0].register_forward_pre_hook(lambda *_: calls.append("run"))
    logits = model(**inputs()).logits
    assert len(calls) == 1
    logits.sum().backward()
    assert len(calls) == 2


@KINDS
def test_a_handful_of_maps_is_learned_by_heart(make_grain_model, photos, num_grains):
    """Cross-entropy on noised maps of photographs falls from ln k to nearly 0, even from pure noise."""
    entropy = region_entropy(photos, 16)
    thresholds = entropy.quantile(torch.arange(1, num_grains) / num_grains).tolist()
    grain_map = grain_map_from_entropy(entropy, thresholds).repeat(4, 1, 1)  # (32, 4, 4)
    class_labels = torch.arange(8).repeat(4)
    model = make_grain_model(num_grains, randomize=False).train()
    scheduler = DDIMScheduler(prediction_type="sample", clip_sample=False)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    state = model.state_from_grain_map(grain_map, num_grains)

    def loss(timestep: torch.Tensor) -> torch.Tensor:
        noised = scheduler.add_noise(state, torch.randn(state.shape, generator=generator), timestep)
        return grain_loss(model(noised, timestep, class_labels).logits, grain_map)["loss"]

    assert loss(torch.full((32,), 500)).item() == pytest.approx(math.log(num_grains))
    for _ in range(200):
        optimizer.zero_grad()
        loss(torch.randint(1000, (32,), generator=generator)).backward()
        optimizer.step()
    with torch.no_grad():
        for timestep in (999, 500, 10):
            assert loss(torch.full((32,), timestep)).item() < 0.1 * math.log(num_grains)


# ---- Diffusers' services ----


@torch.no_grad()
def test_bfloat16_is_close_to_float32(make_grain_model):
    arguments = inputs()
    expected = make_grain_model()(**arguments).logits
    model = make_grain_model().to(torch.bfloat16)
    arguments["hidden_states"] = arguments["hidden_states"].bfloat16()
    logits = model(**arguments).logits
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected).abs().max() < 0.05 * expected.std()
    assert (model(**(arguments | {"fine_ratio": None})).logits.float() - expected)[
        1
    ].abs().max() < 0.05 * expected.std()


@torch.no_grad()
def test_fused_projections_are_the_same_attention(make_grain_model):
    model = make_grain_model()
    expected = model(**inputs()).logits
    model.fuse_qkv_projections()
    assert any("to_qkv" in name for name, _ in model.named_modules())
    torch.testing.assert_close(model(**inputs()).logits, expected, rtol=1e-4, atol=1e-6)
    model.unfuse_qkv_projections()
    assert torch.equal(model(**inputs()).logits, expected)


@torch.no_grad()
def test_layerwise_casting_stores_weights_in_eight_bits_and_computes_with_them(make_grain_model):
    model, rounded = make_grain_model(), make_grain_model()
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    stored = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert set(stored.values()) == {torch.float8_e4m3fn, torch.float32}
    assert stored["transformer_blocks.0.attn.to_q.weight"] == torch.float8_e4m3fn
    for name, parameter in rounded.named_parameters():
        parameter.copy_(parameter.to(stored[name]).float())
    torch.testing.assert_close(model(**inputs()).logits, rounded(**inputs()).logits)


def test_a_lora_adapter_starts_as_the_identity_and_alone_is_trained(make_grain_model):
    model = make_grain_model()
    with torch.no_grad():
        expected = model(**inputs()).logits
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"]))
    logits = model(**inputs()).logits
    torch.testing.assert_close(logits, expected)
    logits.sum().backward()
    trained = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert trained and all("lora" in name for name in trained)
    assert len(trained) == 2 * 2 * len(model.transformer_blocks)  # A and B of to_q and to_v


def test_declared_block_names_are_blocks_of_the_model(make_grain_model):
    model = make_grain_model()
    assert set(model._no_split_modules) | set(model._repeated_blocks) <= {type(m).__name__ for m in model.modules()}


@pytest.mark.parametrize("overrides", [{}, {"num_grains": 3}, {"num_classes": None}, {"fine_ratio_condition": False}])
@torch.no_grad()
def test_a_saved_model_is_the_same_model(make_grain_model, tmp_path, overrides):
    model = make_grain_model(**overrides)
    model.save_pretrained(tmp_path)
    loaded = D2iTGrainModel.from_pretrained(tmp_path)
    ours, theirs = ({k: v for k, v in m.config.items() if k[0] != "_"} for m in (model, loaded))
    assert ours == theirs
    state = model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    arguments = inputs(model.config.num_grains)
    if model.config.num_classes is None:
        del arguments["class_labels"]
    if not model.config.fine_ratio_condition:
        del arguments["fine_ratio"]
    assert torch.equal(loaded(**arguments).logits, model(**arguments).logits)


def test_a_checkpoint_of_fewer_classes_is_refused(make_grain_model, tmp_path):
    """Not even with diffusers' option that ignores mismatched sizes: it would leave random weights."""
    make_grain_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="label_embed"):
        D2iTGrainModel.from_pretrained(tmp_path, num_classes=20)
    with pytest.raises(ValueError, match="label_embed"):
        D2iTGrainModel.from_pretrained(tmp_path, num_classes=20, ignore_mismatched_sizes=True, low_cpu_mem_usage=False)


def test_grain_s_has_the_33_million_parameters_of_the_paper():
    with torch.device("meta"):
        model = D2iTGrainModel(**load_preset("grain-s"))
    assert model.num_parameters() == pytest.approx(33e6, rel=0.005)


# ---- Bad input ----


@pytest.mark.parametrize("num_grains", [0, 1])
def test_a_model_of_fewer_than_two_grains_is_refused(make_grain_model, num_grains):
    with pytest.raises(ValueError, match="`num_grains`.* 2"):
        make_grain_model(num_grains=num_grains)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_states": torch.zeros(3, 3, 4, 6)}, r"\(B, 2, h, w\), got \(3, 3, 4, 6\)"),
        ({"hidden_states": torch.zeros(3, 2, 4)}, r"\(B, 2, h, w\), got \(3, 2, 4\)"),
        ({"timestep": torch.tensor([1, 2])}, r"`timestep` must be a scalar or have shape \(3,\), got \(2,\)"),
        ({"timestep": torch.zeros(3, 1)}, r"`timestep`.*got \(3, 1\)"),
        ({"class_labels": None}, "`class_labels` are required by a model of 10 classes"),
        ({"class_labels": torch.tensor([0, 1, 11])}, r"0 \.\.\. 10 \(no class\), got 0 to 11"),
        ({"class_labels": torch.tensor([0, -1, 1])}, "got -1 to 1"),
        ({"class_labels": torch.tensor([0, 1])}, r"int64 of shape \(3,\), got torch.int64 of shape \(2,\)"),
        ({"class_labels": torch.tensor([0.0, 1.0, 2.0])}, "int64.*got torch.float32"),
        ({"class_labels": torch.tensor([0, 1, 2], dtype=torch.int32)}, "int64.*got torch.int32"),
        ({"fine_ratio": torch.tensor([0.5])}, r"`fine_ratio` must be floating point of shape \(3,\)"),
        ({"fine_ratio": torch.tensor([0, 1, 1])}, "`fine_ratio` must be floating point.*got torch.int64"),
        ({"fine_ratio": torch.tensor([0.5, 1.5, math.nan])}, r"`fine_ratio`.*\[0, 1\]"),
        ({"fine_ratio": torch.tensor([0.5, -0.5, math.nan])}, r"`fine_ratio`.*\[0, 1\]"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(make_grain_model, changes, message):
    with pytest.raises(ValueError, match=message):
        make_grain_model()(**(inputs() | changes))
