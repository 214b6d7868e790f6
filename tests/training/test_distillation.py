# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""A DC-DiT with the blocks of a DiT, compared with it cell by cell."""

import pytest
import torch

from diffusers_d2it import DCDiTModel
from diffusers_d2it.training import Distillation


LATENTS = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
GIVEN = LATENTS, torch.tensor([999, 20]), torch.tensor([3, 10])


@pytest.fixture
def pair(make_content_model, make_dcdit):
    """A student whose blocks are the teacher's, and the teacher."""
    teacher = make_content_model(attention_head_dim=32)
    student = make_dcdit(conditioning_norm=True, position_patch_size=2).train()
    student.transformer_blocks.load_state_dict(teacher.transformer_blocks.state_dict())
    return student, teacher


def outputs_of(blocks, run) -> list[torch.Tensor]:
    """What each of the blocks returns while something runs."""
    found = []
    handles = [block.register_forward_hook(lambda block, inputs, output: found.append(output)) for block in blocks]
    run()
    for handle in handles:
        handle.remove()
    return found


def test_every_token_is_compared_with_the_patch_it_lies_in(pair):
    student, teacher = pair
    tokens = outputs_of(student.transformer_blocks, lambda: student(*GIVEN))
    fine = torch.ones(2, 4, 4, dtype=torch.int64)
    patches = outputs_of(teacher.transformer_blocks, lambda: teacher(*GIVEN[:2], fine, GIVEN[2]))
    distillation = Distillation(student, teacher)
    output = student(*GIVEN)
    expected = [(output.sample - teacher(*GIVEN[:2], fine, GIVEN[2]).sample).square().mean()]
    cells = [(b, row, column) for b in range(2) for row in range(8) for column in range(8)]
    kept = [cell for cell in cells if output.kept[cell]]
    for ours, theirs in zip(tokens, patches):
        pairs = zip(ours, (theirs[b, row // 2 * 4 + column // 2] for b, row, column in kept), strict=True)
        expected.append(torch.stack([(a - b).square().mean() for a, b in pairs]).mean() / len(tokens))
    torch.testing.assert_close(distillation(output.kept, output.sample, *GIVEN), sum(expected))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_student_learns_and_the_teacher_stays(pair, checkpointed):
    student, teacher = pair
    before = {name: weight.clone() for name, weight in teacher.state_dict().items()}
    if checkpointed:
        student.enable_gradient_checkpointing()
    distillation = Distillation(student, teacher)
    optimizer, losses = torch.optim.Adam(student.parameters(), lr=3e-3), []
    for _ in range(20):
        output = student(*GIVEN)
        loss = distillation(output.kept, output.sample, *GIVEN)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert all(weight.equal(before[name]) for name, weight in teacher.state_dict().items())
    with torch.no_grad():  # samples that are drawn in between
        student(-LATENTS, *GIVEN[1:])
    output = student(*GIVEN)
    assert distillation(output.kept, output.sample, *GIVEN) < 0.6 * losses[0]


@pytest.mark.parametrize(
    "changes, named",
    [({"num_layers": 1}, "`num_layers`.*2.*1"), ({"position_patch_size": 1}, "`position_patch_size`.*2.*1")],
)
def test_another_teacher_is_named(make_content_model, changes, named):
    config = {"sample_size": 8, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 32, "num_classes": 10}
    student = DCDiTModel(**config | {"norm_num_groups": 4, "position_patch_size": 2} | changes)
    with pytest.raises(ValueError, match=named):
        Distillation(student, make_content_model(attention_head_dim=32))
