"""What is minimised: cross-entropy, the divergence from a teacher, or a mixture of both."""

import torch
from torch import Tensor, nn

from uptrain.training.head import SplitModel
from uptrain.training.loss import chunked_loss, even_chunk


class Objective(nn.Module):
    """The student and its loss in one module, so that they are sharded and run as one."""

    def __init__(
        self,
        student: SplitModel,
        teacher: SplitModel | None = None,
        distillation_weight: float = 0.0,
        *,
        fused: bool = False,
    ) -> None:
        """Put them together.

        Args:
            student: The model to train.
            teacher: A model with the same vocabulary, in eval mode; none for cross-entropy alone.
            distillation_weight: Of KL(teacher ‖ student), 0 … 1; cross-entropy has the rest.
            fused: Compile the loss; for a GPU.
        """
        super().__init__()
        self.model = student.model
        # The teacher is no part of the module, which holds what is trained and saved.
        self._student, self._teacher = student, teacher
        self._fused, self._weight = fused, distillation_weight

    def forward(
        self, inputs: Tensor, targets: Tensor, position_ids: Tensor | None = None
    ) -> Tensor:
        """Sum the losses of a batch's tokens.

        Args:
            inputs: Token ids, int64 [B, L].
            targets: The token behind each input, int64 [B, L].
            position_ids: int64 [B, L], starting anew where attention must not look back; from 0 on
                in every sequence if not given.

        Returns:
            Float32 [3], sums in nats: the objective, cross-entropy, and KL(teacher ‖ student), 0
            without a teacher. Sums, so that parts of a batch can be added.
        """
        given = {"input_ids": inputs}
        if position_ids is not None:
            given["position_ids"] = position_ids
        hidden = self._student.hidden(**given)
        teacher = self._teacher
        teacher_hidden = None
        if teacher is not None:
            # The teacher's arithmetic is that of its own dtype.
            with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
                teacher_hidden = teacher.hidden(**given)
        return chunked_loss(
            self._student.logits,
            hidden,
            targets,
            self._student.head_parameters(),
            even_chunk(targets.numel(), self._student.split.vocabulary, inputs.device),
            teacher_head=None if teacher is None else teacher.logits,
            teacher_hidden=teacher_hidden,
            distillation_weight=self._weight,
            fused=self._fused,
        )
