import json
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from vision_tower_run import BACKBONE, last_checkpoint, make_stage, make_trainer, write_judges

from hydra_hf.modeling.compat import CHECKPOINTING
from hydra_hf.training.interruption import TrainingInterruptedError
from hydra_hf.training.recipe import TokenizerLossWeights


@pytest.fixture(scope="module")
def judges(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judges")
    write_judges(folder)
    return folder


@pytest.fixture(scope="module")
def finished(judges, tmp_path_factory):
    """The folder of an unbroken run."""
    folder = tmp_path_factory.mktemp("unbroken")
    make_trainer(folder, make_stage(judges)).train()
    return folder


def log_of(folder) -> dict[int, dict]:
    return {record["step"]: record for record in map(json.loads, (folder / "log.jsonl").read_text().splitlines())}


def weights_of(folder, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(last_checkpoint(folder) / f"{name}.safetensors")


def test_every_loss_is_logged_under_the_name_of_its_weight(finished):
    losses = {"flow", "kl", "cosine", "distill", "perceptual", "discriminator"}
    others = {"step", "loss", "learning_rate_factor"}
    assert set(log_of(finished)[1]) == losses | others
    assert set(log_of(finished)[2]) == losses | others | {"adversarial"}  # after the discriminator's head start
    assert set(log_of(finished)[3]) == losses | others | {"adversarial", "psnr", "ssim"}


def test_the_loss_is_the_weighted_sum_of_all_but_the_discriminators(finished, judges):
    record, weights = log_of(finished)[2], make_stage(judges).loss_weights
    names = ("flow", "kl", "cosine", "distill", "perceptual", "adversarial")
    assert record["loss"] == pytest.approx(sum(getattr(weights, name) * record[name] for name in names), rel=1e-5)


def test_judges_are_no_part_of_the_model(finished, judges):
    names = set(weights_of(finished))
    plain = replace(make_stage(judges), loss_weights=TokenizerLossWeights())
    assert names == {f"model.value.{name}" for name in make_trainer(finished, plain).model.state_dict()}


def test_a_killed_run_with_a_discriminator_ends_as_an_unbroken_one(finished, judges, tmp_path):
    trainer = make_trainer(tmp_path, make_stage(judges))
    for _ in range(2):
        trainer.train_step()
        trainer.step += 1
    trainer.save_checkpoint()
    trainer = make_trainer(tmp_path, make_stage(judges))
    trainer.train()
    assert log_of(tmp_path)[3] == log_of(finished)[3]
    for name in ("model", "ema", "optimizer", "discriminator", "discriminator_optimizer"):
        torch.testing.assert_close(weights_of(tmp_path, name), weights_of(finished, name), rtol=0, atol=0)


def test_accumulation_does_not_change_a_step(finished, judges, tmp_path):
    """Four pictures one by one, with two optimizers: each steps once, on the mean of the gradients."""
    make_trainer(tmp_path, make_stage(judges), micro_batch_size=1).train()
    expected, found = log_of(finished), log_of(tmp_path)
    assert found.keys() == expected.keys()
    for step, record in found.items():
        assert record == pytest.approx(expected[step], rel=1e-4, abs=1e-5)
    for name in ("model", "discriminator"):
        torch.testing.assert_close(weights_of(tmp_path, name), weights_of(finished, name), rtol=0, atol=1e-4)


def test_gradient_checkpointing_does_not_change_a_step(finished, judges, tmp_path):
    trainer = make_trainer(tmp_path, make_stage(judges), gradient_checkpointing=True)
    assert getattr(trainer.model, f"is_{CHECKPOINTING}")
    trainer.train()
    torch.testing.assert_close(weights_of(tmp_path), weights_of(finished), rtol=0, atol=1e-6)


@torch.no_grad()
def test_what_is_distilled_are_the_layers_of_the_understanding_path(judges, tmp_path):
    trainer = make_trainer(tmp_path, make_stage(judges))
    pixel_values = trainer.batches(0, range(4))
    noise = trainer.sample_noise(pixel_values, range(4))
    states = trainer.model(pixel_values, **noise, distill_layers=(3, 1)).hidden_states
    expected = trainer.model.model(pixel_values, output_hidden_states=True).hidden_states
    torch.testing.assert_close(states, (expected[3], expected[1]))


def test_each_optimizer_moves_its_own_network_and_no_other(judges, tmp_path):
    trainer = make_trainer(tmp_path, make_stage(judges))
    trainer.step = 1  # the adversarial loss is on
    networks = {"model": trainer.model, "discriminator": trainer.discriminator, "teacher": trainer.teacher,
                "perceptual": trainer.perceptual}  # fmt: skip
    before = {name: torch.nn.utils.parameters_to_vector(network.parameters()) for name, network in networks.items()}
    before = {name: value.clone() for name, value in before.items()}
    trainer.train_step()
    after = {name: torch.nn.utils.parameters_to_vector(network.parameters()) for name, network in networks.items()}
    assert {name for name in networks if not torch.equal(before[name], after[name])} == {"model", "discriminator"}


def test_every_trained_parameter_has_a_gradient(judges, tmp_path):
    """Or several processes would wait for each other."""
    trainer = make_trainer(tmp_path, make_stage(judges))
    trainer.optimizer.zero_grad = lambda: None
    trainer.train_step()
    assert [name for name, parameter in trainer.model.named_parameters() if parameter.grad is None] == []


def test_the_decoder_is_told_to_please_the_discriminator_and_the_discriminator_not(judges, tmp_path):
    """The discriminator's gradient comes from its own loss alone: it is the same whatever `adversarial` weighs."""
    moved = []
    for adversarial in (0.0, 1.0):
        weights = TokenizerLossWeights(adversarial=adversarial, discriminator=1.0)
        trainer = make_trainer(tmp_path, make_stage(judges, loss_weights=weights))
        trainer.step = 1
        trainer.train_step()
        moved.append(
            [torch.nn.utils.parameters_to_vector(m.parameters()) for m in (trainer.model, trainer.discriminator)]
        )
    (model, discriminator), (other_model, other_discriminator) = moved
    assert not torch.equal(model, other_model)
    assert torch.equal(discriminator, other_discriminator)


def test_the_adaptive_weight_makes_both_gradients_of_the_last_layer_as_long(judges, tmp_path):
    weights = TokenizerLossWeights(kl=0.0, cosine=0.0, adversarial=1.0, discriminator=1.0)
    trainer = make_trainer(tmp_path, make_stage(judges, loss_weights=weights, adaptive_adversarial_weight=True))
    trainer.step = 1
    last = trainer.model.model.pixel_decoder.out_proj.weight
    pixel_values, rows = trainer.batches(1, range(4)), range(4)
    outputs = trainer.model(pixel_values, **trainer.sample_noise(pixel_values, rows))
    losses = trainer.tokenizer_losses(outputs, pixel_values)
    reconstruction = sum(losses.values())
    total = trainer.add_adversarial(losses, outputs.clean_pixel_values)
    first, both = (torch.autograd.grad(x, last, retain_graph=True)[0] for x in (reconstruction, total))
    torch.testing.assert_close((both - first).norm(), first.norm(), rtol=1e-2, atol=0)


def test_the_discriminator_learns_to_tell_pictures_from_copies(judges, tmp_path):
    weights = TokenizerLossWeights(discriminator=1.0)
    trainer = make_trainer(tmp_path, make_stage(judges, loss_weights=weights, discriminator_learning_rate=1e-3))
    pictures = trainer.batches(0, range(4))
    copies = 0.1 * torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    losses = [trainer.discriminator_step(pictures, copies).item() for _ in range(8)]
    assert losses[-1] < 0.8 * losses[0]


def test_a_frechet_distance_while_training_names_its_backbone(judges, tmp_path):
    weights = str(judges / "backbone.safetensors")
    stage = make_stage(
        judges, num_steps=1, loss_weights=TokenizerLossWeights(), frechet_backbone=BACKBONE, frechet_weights=weights
    )
    make_trainer(tmp_path, stage).train()
    assert log_of(tmp_path)[1]["frechet/test_efficientnet"] > 0


def test_bf16_trains_with_every_judge(judges, tmp_path):
    make_trainer(tmp_path, make_stage(judges, mixed_precision="bf16")).train()
    assert all(torch.tensor(list(record.values())).isfinite().all() for record in log_of(tmp_path).values())


def test_a_layer_that_the_student_does_not_have_is_refused(judges, tmp_path):
    with pytest.raises(ValueError, match=r"distill_layers=\(1, 4\) must be blocks 1 to 3 of the ViT"):
        make_trainer(tmp_path, make_stage(judges, distill_layers=(1, 4)))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (TokenizerLossWeights(adversarial=1.0), "needs a discriminator"),
        (TokenizerLossWeights(distill=1.0), "needs a teacher"),
    ],
)
def test_a_loss_without_its_judge_is_refused(judges, weights, message):
    with pytest.raises(ValueError, match=message):
        make_stage(judges, loss_weights=weights, teacher=None)


def test_the_bar_is_closed_before_an_interrupt_is_told(judges, tmp_path, capsys):
    trainer = make_trainer(tmp_path, make_stage(judges, loss_weights=TokenizerLossWeights()))
    trainer.stop.signum = signal.SIGTERM
    with pytest.raises(TrainingInterruptedError, match="all stopped at step 1 by SIGTERM"):
        trainer.train_steps()
    assert capsys.readouterr().err.endswith("\n")
