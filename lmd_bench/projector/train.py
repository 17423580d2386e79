"""Trains a latent space projector (LMD eq. 2 to 6): a VQGAN, a KL autoencoder, or our light one."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lmd_bench.errors import ConfigError, TrainingError
from lmd_bench.projector.codebook import codebook_use, count_codes, revive_dead_codes
from lmd_bench.projector.config import config_of_path, weights_digest
from lmd_bench.projector.discriminator import PatchDiscriminator
from lmd_bench.projector.losses import (
    PerceptualDistance,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    perceptual_obstacle,
)
from lmd_bench.projector.train_config import (
    PLACE,
    LSPTrainOptions,
    changed_options,
    option_texts,
    resolve,
    unused_options,
)
from lmd_bench.projector.train_data import HELD_OUT_START, TrainData, patch_pca_psnr
from lmd_bench.projector.train_folder import LOG_FILE, STATE_FILE, check_out, prepare, write_model
from lmd_bench.projector.train_kinds import TRAINABLE, TrainableProjector, VQTrainable, quantises
from lmd_bench.projector.train_report import HeldOut, TrainReport, log_line, measure, report_on, write_csv
from lmd_bench.seeding import derive_seed

__all__ = ["HELD_OUT_START", "STATE_FILE", "LSPTrainOptions", "TrainReport", "patch_pca_psnr", "train_lsp"]

_PARTS = ("loss", "reconstruction", "l1", "l2", "perceptual", "regulariser", "generator", "adaptive_weight", "disc")
_SAMPLE_IMAGES = 4096

Row = dict[str, float | None]
Log = Callable[[str], None]


def train_lsp(
    out: Path,
    options: LSPTrainOptions,
    *,
    device: str = "cpu",
    force: bool = False,
    log: Log = lambda line: None,
) -> TrainReport:
    """Trains a projector and writes it to `out`, a diffusers folder with a README of how, and how well.

    Beside it stand training.csv and training-data.json. While training runs, training-state.pt is written there every
    `save_every` steps and at the last; with it in place, the same call goes on where it stopped. On one machine's CPU
    and number of threads the same options give the same weights bit for bit, stopped in between or not. force: a
    projector that lies in `out` is removed once all is checked. `log` takes lines of progress.

    Raises ConfigError for a folder that cannot be written, holds other files or a projector already, or whose state is
    of other options or other images; WeightsError where LPIPS is asked for and its weights are not there, or for an
    `init_from` that does not fit; DataError for images that cannot be used; TrainingError for a loss or weights that
    are not finite.
    """
    check_out(out, options, force=force)
    unused = unused_options(options)
    perceptual, why_not = _open_perceptual(options)
    options = resolve(options, perceptual=perceptual is not None)
    state = _read_state(out / STATE_FILE, options)
    if options.init_from is not None:  # what does not fit is said before the wait
        TRAINABLE[options.kind].build(options).start_from(options.init_from)
    if unused:
        log(f"without effect in this training: {', '.join(unused)}")
    if why_not:
        log(f"without LPIPS: {why_not}")
    log(_describe_data_ahead(options))
    data = TrainData(options, torch.device(device))
    if data.warning:
        log(data.warning)
    try:
        training = _Training(options, data, perceptual if options.perceptual_weight else None, torch.device(device))
        if state is not None:
            _require_inputs(out / STATE_FILE, state["inputs"], training.inputs)
            training.load_state(state)
            log(f"going on after step {training.step}")
        prepare(out, data.split, going_on=state is not None)
        _run(training, out, log)
        sample = data.sample(_SAMPLE_IMAGES)
        if options.normalise_latents:
            training.projector.normalise(sample)
        write_model(out, training.projector, half=options.half)
        reopened = TRAINABLE[options.kind].reopen(out)
        reopened.model.to(device=device, memory_format=torch.channels_last)
        report = report_on(out, reopened, sample, data, options, training.column("reconstruction"))
        (out / STATE_FILE).unlink(missing_ok=True)
    finally:
        data.close()
    log(f"held-out {report.summary}, written to {out}")
    return report


def _describe_data_ahead(options: LSPTrainOptions) -> str:
    if options.data is None:
        return f"drawing {options.num_images} scenes of {options.image_size} px"
    return f"looking through {options.data}"


def _open_perceptual(options: LSPTrainOptions) -> tuple[PerceptualDistance | None, str | None]:
    """LPIPS where it can be had, or why it takes no part although nobody switched it off."""
    if options.perceptual_weight == 0:
        return None, None
    net: Any = options.perceptual_net
    trunk = None if options.perceptual_trunk is None else Path(options.perceptual_trunk)
    if options.perceptual_weight is None and trunk is None:
        obstacle = perceptual_obstacle(net, trunk)
        if obstacle is not None:
            return None, obstacle
    distance = PerceptualDistance.open(net, trunk)
    if resolve(options, perceptual=True).perceptual_weight == 0:
        return distance, f"crops of {options.crop_size} px are too small for it"
    return distance, None


def _read_state(file: Path, options: LSPTrainOptions) -> dict[str, Any] | None:
    if not file.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        before, _ = state["options"], state["inputs"]
    except Exception as error:  # pickle, zip and torch raise almost anything on damaged files
        raise ConfigError(f"{PLACE}: {file} cannot be read ({type(error).__name__}); remove it to start anew") from None
    now = option_texts(options)
    changed = changed_options(now, before)
    if changed:
        told = ", ".join(f"{name} {before.get(name)} (now {now.get(name)})" for name in changed[:6])
        raise ConfigError(
            f"{PLACE}: {file} is of a training with other options: {told}; give the same ones to go on, or remove it to"
            " start anew"
        )
    return state


def _inputs(options: LSPTrainOptions, data: TrainData, perceptual: PerceptualDistance | None) -> dict[str, str | None]:
    """Digests of what lies outside the options: images, weights to start from, LPIPS."""
    start = None if options.init_from is None else weights_digest(config_of_path(options.init_from))
    trunk = None if perceptual is None else _digest_of(perceptual)
    return {"data": data.split.digest, "init_from": start, "perceptual": trunk}


def _digest_of(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _require_inputs(file: Path, before: dict[str, str | None], now: dict[str, str | None]) -> None:
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        told = ", ".join(f"{name} {before.get(name)} (now {now[name]})" for name in changed)
        raise ConfigError(
            f"{PLACE}: {file} is of a training on other contents of files: {told}; bring the earlier ones back to go"
            " on, or remove it to start anew"
        )


def _run(training: _Training, out: Path, log: Log) -> None:
    """Takes all steps that are left."""
    options = training.options
    batches = training.data.batches(training.step)
    try:
        while training.step < options.steps:
            training.take_step(next(batches))
            done = training.step
            last = done == options.steps
            evaluated = last or done % options.eval_every == 0
            logged = evaluated or done % options.log_every == 0
            saved = last or done % options.save_every == 0
            if logged or saved:
                training.require_finite(out / STATE_FILE)
            if logged:
                training.add_row(training.measure() if evaluated else None)
                write_csv(out / LOG_FILE, training.rows)
                log(log_line(training.rows[-1], options.steps))
            if saved:
                _write_state(out / STATE_FILE, training.state())
    finally:
        batches.close()


def _write_state(file: Path, state: dict[str, Any]) -> None:
    unfinished = file.with_name(file.name + ".unfinished")
    torch.save(state, unfinished)
    os.replace(unfinished, file)


class _Training:
    """Networks, optimizers and what was seen so far. Randomness is a function of the seed and the step alone."""

    def __init__(
        self,
        options: LSPTrainOptions,
        data: TrainData,
        perceptual: PerceptualDistance | None,
        device: torch.device,
    ) -> None:
        self.options = options
        self.data = data
        self.step = 0  # steps taken
        self.rows: list[Row] = []
        self.projector: TrainableProjector = TRAINABLE[options.kind].build(options)
        if options.init_from is not None:
            self.projector.start_from(options.init_from)
        self.projector.model.to(device=device, memory_format=torch.channels_last).train()
        self.inputs = _inputs(options, data, perceptual)
        self._optimizer = _autoencoder_optimizer(self.projector.model, options)
        self._perceptual = None if perceptual is None else perceptual.to(device)
        self._discriminator = _build_discriminator(options, device)
        self._disc_optimizer = _discriminator_optimizer(self._discriminator, options)
        self._parts: list[Tensor] = []  # (1 or more steps, len(_PARTS)) each, all steps together, on the device
        self._row_start = 0
        codes = 0 if self.projector.codebook is None else len(self.projector.codebook)
        self._row_counts = torch.zeros(codes, dtype=torch.int64, device=device)
        self._revival_counts = self._row_counts.clone()
        self._revived = 0

    # -- one step -----------------------------------------------------------------------------------------------------

    def take_step(self, images: Tensor) -> None:
        """One step of the autoencoder and, once it has started, one of the discriminator, on the same pass.

        The released VQGAN runs the autoencoder a second time for the discriminator, after its own step; here the
        discriminator sees the reconstructions from before that step, which costs one pass instead of two. Before
        `disc_start` the adversarial term has factor 0, as released, so it is not computed at all.
        """
        options, step = self.options, self.step
        if isinstance(self.projector, VQTrainable) and self._codebook_starts():
            self.projector.spread_codebook(self._codebook_sample(), options.seed)
        done = self.projector.forward(images, options, step)
        parts = self._reconstruction_parts(done.images, images)
        loss = parts["reconstruction"] + done.regulariser
        fighting = self._discriminator is not None and step >= (options.disc_start or 0)
        if fighting:
            parts["generator"], parts["adaptive_weight"] = self._adversarial(parts["reconstruction"], done.images)
            loss = loss + parts["adaptive_weight"] * parts["generator"]
        self._step_autoencoder(loss)
        if fighting:
            parts["disc"] = self._step_discriminator(images, done.images.detach())
        self._parts.append(_stacked({**parts, "loss": loss, "regulariser": done.regulariser}))
        self._watch_codes(done.indices, done.latents)
        self.step += 1

    def _reconstruction_parts(self, rebuilt: Tensor, images: Tensor) -> dict[str, Tensor]:
        options = self.options
        parts = {"l1": functional.l1_loss(rebuilt, images), "l2": functional.mse_loss(rebuilt, images)}
        total = options.l1_weight * parts["l1"] + options.l2_weight * parts["l2"]
        if self._perceptual is not None and options.perceptual_weight:
            parts["perceptual"] = self._perceptual(rebuilt, images).mean()
            total = total + options.perceptual_weight * parts["perceptual"]
        return {**parts, "reconstruction": total}

    def _adversarial(self, reconstruction: Tensor, rebuilt: Tensor) -> tuple[Tensor, Tensor]:
        """The autoencoder's adversarial loss, and its weight (eq. 6)."""
        assert self._discriminator is not None
        self._discriminator.requires_grad_(False)
        kind: Any = self.options.disc_loss
        loss = generator_loss(self._discriminator(rebuilt), kind)
        weight = self.options.disc_weight or 0.0
        return loss, adaptive_weight(reconstruction, loss, self.projector.last_layer, weight=weight)

    def _step_autoencoder(self, loss: Tensor) -> None:
        options = self.options
        adamw = options.optimizer == "adamw"
        for group in self._optimizer.param_groups:
            group["lr"] = _rate(self.step, options)
        self._optimizer.zero_grad()
        loss.backward()
        if adamw:
            nn.utils.clip_grad_norm_(self.projector.model.parameters(), 1.0)
        self._optimizer.step()

    def _step_discriminator(self, images: Tensor, rebuilt: Tensor) -> Tensor:
        assert self._discriminator is not None
        assert self._disc_optimizer is not None
        self._discriminator.requires_grad_(True)
        kind: Any = self.options.disc_loss
        loss = discriminator_loss(self._discriminator(images), self._discriminator(rebuilt), kind)
        self._disc_optimizer.zero_grad()
        loss.backward()
        self._disc_optimizer.step()
        return loss

    # -- the codebook -------------------------------------------------------------------------------------------------

    def _codebook_starts(self) -> bool:
        options = self.options
        return options.codebook_init == "data" and self.step == options.codebook_init_step

    def _codebook_sample(self) -> Tensor:
        """Training images with about 16 latent positions for each code."""
        per_image = (self.options.image_size // self.options.factor) ** 2
        return self.data.sample(max(64, 16 * self.options.num_codes // per_image))

    def _watch_codes(self, indices: Tensor | None, latents: Tensor) -> None:
        """Counts the codes of a step; at the end of a window gives the unused ones a new place, if asked to."""
        codebook = self.projector.codebook
        if indices is None or codebook is None:
            return
        counts = count_codes(indices, len(codebook))
        self._row_counts += counts
        self._revival_counts += counts
        # Windows start with the codebook: one of an earlier start would call codes dead after fewer steps.
        start = self.options.codebook_init_step if self.options.codebook_init == "data" else 0
        if (self.step + 1 - start) % self.options.revive_every:
            return
        if self.options.revive_dead_codes:
            held = self._optimizer.state[codebook]
            moments = [held[name] for name in ("exp_avg", "exp_avg_sq")]
            generator = torch.Generator().manual_seed(derive_seed("projector-revive", self.options.seed, self.step))
            self._revived += revive_dead_codes(codebook, self._revival_counts, latents, moments, generator)
        self._revival_counts.zero_()

    # -- what is told -------------------------------------------------------------------------------------------------

    def column(self, name: str) -> list[float]:
        """One part of the loss at every step so far."""
        values: list[float] = torch.cat(self._parts)[:, _PARTS.index(name)].tolist()
        return values

    def measure(self) -> HeldOut:
        """On held-out images, with the weights as they are now."""
        return measure(self.projector, self.data.held_out, quantising=quantises(self.options, self.step - 1))

    def require_finite(self, state_file: Path) -> None:
        """Raise TrainingError where a loss since the last row, or a weight as it is now, is not finite.

        state_file: the last state, which is named where it is there; other options cannot go on from it.
        """
        remedy = "use a smaller --lr" + (f" and remove {state_file}, to start anew" if state_file.exists() else "")
        self._parts = [torch.cat(self._parts)]
        loss = self._parts[0][self._row_start :, _PARTS.index("loss")].cpu()
        wrong = (~loss.isfinite()).nonzero()
        if len(wrong):
            where = int(wrong[0])
            raise TrainingError(
                f"{PLACE}: loss is {float(loss[where])} at step {self._row_start + where + 1}; {remedy}"
            )
        for model in (self.projector.model, self._discriminator):
            if model is not None and not bool(torch.stack([p.isfinite().all() for p in model.parameters()]).all()):
                what = "discriminator" if model is self._discriminator else "projector"
                raise TrainingError(f"{PLACE}: a weight of the {what} is not finite after step {self.step}; {remedy}")

    def add_row(self, held_out: HeldOut | None) -> None:
        """Means of all steps since the last row; of parts that took no part in some, over the others."""
        self._parts = [torch.cat(self._parts)]
        means = _means(self._parts[0][self._row_start :].cpu())
        row: Row = {"step": self.step, "lr": _rate(self.step - 1, self.options), **means}
        # Images are in [-1, 1] here, so their squared error is 4 times that of images in [0, 1].
        row["psnr_db"] = -10.0 * math.log10(max((means["l2"] or 0.0) / 4.0, 1e-12))
        use = codebook_use(self._row_counts) if len(self._row_counts) else None
        row["code_usage"] = None if use is None else use.usage
        row["code_perplexity"] = None if use is None else use.perplexity
        row["dead_codes"] = None if use is None else use.dead
        row["revived_codes"] = None if use is None else self._revived
        row.update(held_out.columns() if held_out is not None else {})
        self.rows.append(row)
        self._row_start = self.step
        self._row_counts.zero_()
        self._revived = 0

    # -- going on -----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """All that a later process needs to go on as if nothing had happened."""
        self._parts = [torch.cat(self._parts)]
        return {
            "options": option_texts(self.options),
            "inputs": self.inputs,
            "step": self.step,
            "rows": self.rows,
            "row_start": self._row_start,
            "revived": self._revived,
            "parts": self._parts[0],
            "row_counts": self._row_counts,
            "revival_counts": self._revival_counts,
            "model": self.projector.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "discriminator": None if self._discriminator is None else self._discriminator.state_dict(),
            "disc_optimizer": None if self._disc_optimizer is None else self._disc_optimizer.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes over what `state` returned."""
        device = self._row_counts.device
        self.step, self.rows, self._revived = state["step"], state["rows"], state["revived"]
        self._row_start = state["row_start"]
        self._parts = [state["parts"].to(device)]
        self._row_counts.copy_(state["row_counts"])
        self._revival_counts.copy_(state["revival_counts"])
        self.projector.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        if self._discriminator is not None and self._disc_optimizer is not None:
            self._discriminator.load_state_dict(state["discriminator"])
            self._disc_optimizer.load_state_dict(state["disc_optimizer"])


def _stacked(parts: dict[str, Tensor]) -> Tensor:
    """The parts of one step as a row (1, len(_PARTS)) that holds no graph; absent ones are NaN."""
    absent = parts["loss"].new_full((), math.nan)
    return torch.stack([parts.get(name, absent).detach().float() for name in _PARTS])[None]


def _means(window: Tensor) -> Row:
    """Means of (steps, len(_PARTS)) over the steps in which a part was there; None for one that never was."""
    columns = {name: column[~column.isnan()] for name, column in zip(_PARTS, window.unbind(1), strict=True)}
    return {name: float(column.mean()) if len(column) else None for name, column in columns.items()}


def _rate(step: int, options: LSPTrainOptions) -> float:
    """Learning rate of a step of the autoencoder."""
    peak = options.lr or 0.0
    if options.optimizer == "adam":
        return peak
    warmup = min(options.lr_warmup_steps, options.steps // 2)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / (options.steps - warmup)))


def _autoencoder_optimizer(model: nn.Module, options: LSPTrainOptions) -> torch.optim.Optimizer:
    rate = options.lr or 0.0
    if options.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=rate, betas=(0.5, 0.9), fused=True)
    return torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)


def _build_discriminator(options: LSPTrainOptions, device: torch.device) -> PatchDiscriminator | None:
    if not options.adversarial:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed("projector-discriminator", options.seed))
        model = PatchDiscriminator(width=options.disc_channels, num_layers=options.disc_layers)
    model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.train()


def _discriminator_optimizer(
    discriminator: PatchDiscriminator | None, options: LSPTrainOptions
) -> torch.optim.Optimizer | None:
    if discriminator is None:
        return None
    return torch.optim.Adam(discriminator.parameters(), lr=options.disc_lr or 0.0, betas=(0.5, 0.9), fused=True)
