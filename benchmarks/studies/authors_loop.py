"""LinearPatch's offline distillation as its authors' public code does it: what ours is held against."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from transformers import PreTrainedModel

from linearpatch_kernels.distillation.teacher_store import TeacherStore
from linearpatch_kernels.modeling.patched import patches
from linearpatch_kernels.nn import DensePatch


class AuthorsLoop:
    """The whole student runs on every window, its logits [T, V] are held, K of them are gathered.

    loss = KL(teacher's K, softmaxed over the K || softmax of the student's logits at the same ids), summed over the K,
    mean over the tokens. Only the student's dense P [d, d] is trained: AdamW with weight decay 1e-4, a cosine to a
    twentieth of the learning rate over ``steps``, no warm-up and no clipping. Theirs is mixed precision on a GPU; here
    it is float32, which a CPU without bf16 instructions is faster in.
    """

    def __init__(
        self, student: PreTrainedModel, store: TeacherStore, joint: int, learning_rate: float, steps: int
    ) -> None:
        (patch,) = patches(student)[joint]
        assert isinstance(patch, DensePatch)
        self.student, self.store = student, store
        student.requires_grad_(False)
        self.matrix = patch.weight.requires_grad_(True)
        self.optimizer = torch.optim.AdamW([self.matrix], lr=learning_rate, weight_decay=1e-4)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps, eta_min=learning_rate / 20)

    @property
    def done(self) -> int:
        """Steps made."""
        return int(self.schedule.last_epoch)

    def step(self, window: int) -> float:
        batch = self.store.batch([window])
        logits = self.student(batch.input_ids, use_cache=False).logits
        student = logits.gather(-1, batch.ids.long()).log_softmax(-1)
        teacher = batch.probs / batch.probs.sum(-1, keepdim=True)
        loss = torch.nn.functional.kl_div(student, teacher, reduction="batchmean") / student.shape[1]
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return float(loss.detach())

    def save(self, file: Path, about: dict[str, object]) -> None:
        """So that a stopped run can go on; whole or not at all."""
        state = {
            "matrix": self.matrix.detach(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "about": about,
        }
        torch.save(state, file.with_suffix(".new"))
        os.replace(file.with_suffix(".new"), file)

    def load(self, file: Path) -> dict[str, object]:
        """Go on from what `save` wrote; returns what it was told."""
        state = torch.load(file, weights_only=True)
        with torch.no_grad():
            self.matrix.copy_(state["matrix"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        about: dict[str, object] = state["about"]
        return about
