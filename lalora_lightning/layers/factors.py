"""LowRankFactors: the two factors of an adapter, of which a mask selects the current rank."""

import math

import torch
from torch import Tensor, nn

from lalora_lightning import functional
from lalora_lightning.initialization import FACTORIZATIONS, Init
from lalora_lightning.layers.kernels import OutSlices, without_autocast
from lalora_lightning.layers.rank_masks import rank_mask
from lalora_lightning.sharding import gathered

__all__ = ["LowRankFactors"]


class LowRankFactors(nn.Module):
    """The factors ``lora_A`` and ``lora_B`` of a weight increment, their mask and their initial values.

    This is the part of :class:`TruncatedLoRALinear` that does not depend on the kind of the base layer. The attributes
    are documented there.

    Args:
        out_features: ``m``.
        in_features: ``d``.
        out_slices: ``(start, stop)`` ranges of the adapted output features.
        rank: The maximum rank ``r``.
        scaling: Factor of ``B A``.
        init: Name of the initialization.
        freeze_A: Train ``lora_B`` only.
        device: Device of the factors.
        dtype: Data type of the factors.
    """

    rank_mask: Tensor
    start_A: Tensor | None
    start_B: Tensor | None

    def __init__(
        self,
        out_features: int,
        in_features: int,
        out_slices: OutSlices,
        rank: int,
        scaling: float,
        init: Init,
        freeze_A: bool,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = out_features, in_features
        self.out_slices = out_slices
        self.max_rank = rank
        self.scaling = scaling
        self.init = init
        self.freeze_A = freeze_A
        adapted = sum(stop - start for start, stop in out_slices)
        self.lora_A = nn.Parameter(
            torch.empty(len(out_slices) * rank, in_features, device=device, dtype=dtype), not freeze_A
        )
        self.lora_B = nn.Parameter(torch.empty(adapted, rank, device=device, dtype=dtype))
        # In floating point, so that an average of models, by whatever code, averages the masks, too.
        self.register_buffer("rank_mask", torch.empty(rank, dtype=torch.float32, device=device))
        self.register_buffer("start_A", None)
        self.register_buffer("start_B", None)

    @property
    def rank(self) -> Tensor:
        """The current rank, an integer scalar on the device: the number of components that the mask keeps."""
        return self.rank_mask.count_nonzero()

    @torch.no_grad()
    def initialize(self, weight: Tensor | None) -> None:
        """Initialize the factors, and set the maximum rank.

        Args:
            weight: ``(m, d)``, for an initialization that factorizes it; None for the others.

        Raises:
            ValueError: The weight is on the meta device or has a rank below ``max_rank``.
        """
        factors = self.split(self.lora_A, self.lora_B)
        if weight is not None:
            if weight.is_meta:
                raise ValueError(
                    f"Expected a weight with values for init={self.init!r} but it is on the meta device; load it first."
                )
            for (A, B), (start, stop) in zip(factors, self.out_slices, strict=True):
                initial_A, initial_B = FACTORIZATIONS[self.init](weight[start:stop], self.max_rank, self.scaling)
                if not (initial_A.any(1) | initial_B.any(0)).all():
                    raise ValueError(
                        f"Expected a weight of rank {self.max_rank} or more with init={self.init!r} but its rank is "
                        "lower; choose a lower rank, because a component that is zero in both factors never learns."
                    )
                A.copy_(initial_A)
                B.copy_(initial_B)
            self.keep_initial_factors()
        else:
            for A, _ in factors:
                if self.init == "orthogonal":
                    nn.init.orthogonal_(A)
                else:
                    # The norm of each row is about 1/sqrt(3).
                    nn.init.kaiming_uniform_(A, a=math.sqrt(5))
            nn.init.zeros_(self.lora_B)
            self.start_A = self.start_B = None
        self.set_rank(self.max_rank)

    @torch.no_grad()
    def keep_initial_factors(self) -> None:
        """Store a copy of ``lora_A`` and ``lora_B`` as the initial factors, whose product is subtracted."""
        self.start_A, self.start_B = self.lora_A.detach().clone(), self.lora_B.detach().clone()

    def is_trained(self) -> bool:
        """Return whether training has changed ``lora_B``. A sharded adapter is gathered."""
        return bool((gathered(self.lora_B) != (0 if self.start_B is None else self.start_B)).any())

    def set_rank(self, rank: int) -> None:
        """Set the current rank.

        The mask is replaced and not changed, so a forward pass at the old rank can still be differentiated.

        Raises:
            ValueError: The rank is not in [0, max_rank].
        """
        if not 0 <= rank <= self.max_rank:
            raise ValueError(f"Expected rank to be in [0, {self.max_rank}] but got {rank}.")
        # A mask that was made in inference mode could not be used in training.
        with torch.inference_mode(False):
            self.rank_mask = rank_mask(rank, self.max_rank, self.rank_mask.device).to(self.rank_mask.dtype)

    def singular_factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return factors of the same increment at the current rank, along its singular directions.

        The decomposition is that of :func:`lalora_lightning.functional.singular_factors`, for each slice on its own, in
        float32 or wider. A sharded adapter is gathered, so every process has to call this.

        Returns:
            A and B of the shapes of ``lora_A`` and ``lora_B``, and the singular values ``(slices, r)`` of ``B A``.

        Raises:
            ValueError: The layer has initial factors, whose product would have to be rewritten, too; or the factors are
                not finite.
        """
        self.require_no_initial_factors()
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        A, B, mask = self._factors()
        if not (torch.isfinite(A).all() and torch.isfinite(B).all()):
            raise ValueError("Expected finite factors but got NaN or Inf.")
        with without_autocast(A.device):
            parts = [functional.singular_factors(A_s.to(dtype), B_s.to(dtype) * mask) for A_s, B_s in self.split(A, B)]
        new_A, new_B, values = zip(*parts, strict=True)
        return torch.cat(new_A), torch.cat(new_B), torch.stack(values)

    def require_no_initial_factors(self) -> None:
        """Check that the increment is ``B A`` alone.

        Raises:
            ValueError: The product of initial factors is subtracted.
        """
        if self.start_A is not None:
            raise ValueError(
                f"Expected an adapter without initial factors but got one with init={self.init!r}; train with "
                'init="kaiming" or "orthogonal", or save the adapter with save_peft_adapter, which folds them in, and '
                "load that with load_peft_adapter."
            )

    def split(self, A: Tensor, B: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Split tensors of the shapes of ``lora_A`` and ``lora_B`` by slice: ``[(A (r, d), B (m_s, r)), ...]``."""
        if len(self.out_slices) == 1:
            return [(A, B)]
        widths = [stop - start for start, stop in self.out_slices]
        return list(zip(A.chunk(len(widths)), B.split(widths), strict=True))

    def increment(self) -> Tensor:
        """Return the weight increment ``P = scaling * B_r' A_r'`` (m x d) at the current rank, in float32 or wider.

        A sharded adapter is gathered, so every process has to call this.
        """
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        increment = torch.zeros(self.out_features, self.in_features, device=self.lora_A.device, dtype=dtype)
        A, B, mask = self._factors()
        with without_autocast(A.device):
            for (start, stop), (A_s, B_s) in zip(self.out_slices, self.split(A, B), strict=True):
                increment[start:stop] = self.scaling * (B_s.to(dtype) * mask) @ A_s.to(dtype)
        return increment

    @torch.no_grad()
    def folded(self) -> tuple[Tensor, Tensor]:
        """Return the current components of all slices as one plain adapter with scaling 1 and no initial factors.

        Returns:
            A ``(R, d)`` and B ``(m, R)`` with ``P = B A``. R is the current rank times the number of slices, or twice
            that if initial factors are subtracted.
        """
        A, B, mask = self._factors()
        kept = mask != 0
        pairs = [(A_s[kept], self.scaling * (B_s * mask)[:, kept]) for A_s, B_s in self.split(A, B)]
        rank = len(pairs[0][0])
        folded_B = B.new_zeros(self.out_features, len(pairs) * rank)
        for i, ((start, stop), (_, B_s)) in enumerate(zip(self.out_slices, pairs, strict=True)):
            folded_B[start:stop, i * rank : (i + 1) * rank] = B_s
        return torch.cat([A_s for A_s, _ in pairs]), folded_B

    def _factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return A, B and their mask, with the negated initial factors appended as additional components."""
        own_A, own_B = gathered(self.lora_A), gathered(self.lora_B)
        if self.start_A is None or self.start_B is None:
            return own_A, own_B, self.rank_mask
        pairs = zip(self.split(own_A, own_B), self.split(self.start_A, self.start_B), strict=True)
        A = torch.cat([A for (own, _), (initial, _) in pairs for A in (own, initial)])
        return A, torch.cat([own_B, -self.start_B], dim=1), self.rank_mask.repeat(2)

    @torch.no_grad()
    def trim(self) -> None:
        """Cut ``lora_A`` and ``lora_B`` to the current rank; the outputs do not change.

        The parameters are replaced by new ones, so an optimizer has to be built again.

        Raises:
            ValueError: The rank is 0.
        """
        rank = int(self.rank)
        if rank == 0:
            raise ValueError("Expected a rank of at least 1 but it is 0; trim_lora(model) removes such a layer.")
        mask = self.rank_mask[:rank]
        factors = self.split(self.lora_A, self.lora_B)
        self.lora_A = nn.Parameter(torch.cat([A[:rank] for A, _ in factors]), self.lora_A.requires_grad)
        B = (self.lora_B[:, :rank] * mask).to(self.lora_B.dtype)
        self.lora_B = nn.Parameter(B, self.lora_B.requires_grad)
        if self.start_A is not None and self.start_B is not None:
            initial = self.split(self.start_A, self.start_B)
            self.start_A = torch.cat([A[:rank] for A, _ in initial])
            self.start_B = (self.start_B[:, :rank] * mask).to(self.start_B.dtype)
        self.max_rank = rank
        self.set_rank(rank)
