"""Anchors of the relation loss: the embeddings that teacher and student are compared with."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ctx_distill.errors import InputError
from ctx_distill.models.xray_expert import XrayExpert
from ctx_distill.retrieval.store import XrayIndexArtefact
from ctx_distill.seeds import run_seed
from ctx_distill.stages.shared.prompt_scores import prompt_features
from ctx_distill.text.extractor import load_vocabulary

AnchorKind = Literal["batch", "bank", "prompts"]


class Anchors:
    """Provide anchors, (K, D_v) unit rows in the space of u.

    Args:
        kind: `batch`: the reports of the global batch; `prompts`: findings prompts; `bank`: a random sample of
            the pool's image features.
        expert: The teacher.
        store: The X-ray index.
        bank_size: Rows of the bank; at most the pool size.
        vocabulary: Findings of the prompts.

    Raises:
        InputError: The anchors are texts but the teacher has no joint space, or the bank is too small.
    """

    def __init__(
        self, kind: AnchorKind, expert: XrayExpert, store: XrayIndexArtefact, bank_size: int, vocabulary: str
    ) -> None:
        self.kind, self._vocabulary = kind, vocabulary
        self._fixed: Tensor | None = None
        if kind == "bank":
            if bank_size < 2 or len(store) < 2:
                raise InputError(
                    f"stage 2: the bank has {min(bank_size, len(store))} anchors; expected 2 or more. Increase "
                    "bank_size, or index more X-rays."
                )
            order = torch.randperm(len(store), generator=torch.Generator().manual_seed(run_seed()))
            self._fixed = F.normalize(store.values(order[:bank_size].sort().values), dim=-1)
        elif not expert.has_joint_space:
            reason = (
                f"text embeddings of dimension {expert.text_dim} and image embeddings of dimension {expert.embed_dim}"
                f"{'' if expert.logit_scale else ', with no temperature'}"
                if expert.has_text
                else "no text tower"
            )
            raise InputError(
                f"stage 2: anchors={kind} needs a joint space of texts and images, but the expert {expert.name} has "
                f"{reason}. Set model.init_args.anchors=bank."
            )

    def anchors_for(self, expert: XrayExpert, texts: Tensor | None, device: torch.device) -> Tensor:
        """Return the anchors of a step, (K, D_v).

        Args:
            expert: The teacher, on the device.
            texts: (B, D_v) embeddings of the global batch's reports; used by `batch` only. With fewer than two, the
                prompts are used instead.
            device: Device of the result.
        """
        if self.kind == "batch" and texts is not None and len(texts) > 1:
            return texts
        if self._fixed is None:
            names = load_vocabulary(self._vocabulary).names
            self._fixed = torch.cat(prompt_features(expert.encode_text, names, "default"))
        if self._fixed.device != device:
            self._fixed = self._fixed.to(device)
        return self._fixed
