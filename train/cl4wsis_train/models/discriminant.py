"""Class means and a shared covariance of encoder features: which class a pixel of an object belongs to.

Images of later steps show no objects that are known to be of old classes, so nothing that learns from them by gradients
is ever told how old and new classes differ. A linear discriminant needs no such images: the statistics of each class
come from the step that brings it, and they stay true as long as the encoder does.

Source: deep streaming linear discriminant analysis (Hayes and Kanan, CVPR Workshops 2020), which classifies images.

Legend: B images, C channels with background, K = C - 1 classes, d channels of the features, h x w their grid.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl4wsis.errors import RunError

NO_CLASS = -1
"""Label of a cell that is left out of the statistics."""
_SHRINKAGE = 0.01  # share of the mean variance that is added to every variance


class LinearDiscriminant(nn.Module):
    """Corrects the classes of a semantic map; what is background and what is an object stays as it is.

    Args:
        num_features: d.
        class_counts: classes that each step adds.
        strength: factor on the log-likelihood ratios. Below 1, because neighbouring cells are no independent witnesses.
        window: side of the square of cells over which the ratios are averaged, odd.
    """

    class_means: Tensor
    """(K, d)."""
    num_images: Tensor
    """(K,) images that showed the class; 0 for a class without statistics."""
    covariance: Tensor
    """(d, d) within classes."""
    weight: Tensor
    """(K, d, 1, 1) of the linear discriminant that follows from the above."""
    bias: Tensor
    """(K,)."""

    def __init__(self, num_features: int, class_counts: Sequence[int], strength: float, window: int) -> None:
        super().__init__()
        num_classes = sum(class_counts)
        self.num_old_classes = num_classes - class_counts[-1]
        self.strength, self.window = strength, window
        self.register_buffer("class_means", torch.zeros(num_classes, num_features))
        self.register_buffer("num_images", torch.zeros(num_classes))
        self.register_buffer("covariance", torch.zeros(num_features, num_features))
        self.register_buffer("weight", torch.zeros(num_classes, num_features, 1, 1))
        self.register_buffer("bias", torch.zeros(num_classes))

    def forward(self, features: Tensor, semantic_logits: Tensor) -> Tensor:
        """Return logits of which each object pixel's share of the classes is corrected.

        With p the class probabilities among objects and s the score of the discriminant, averaged over the window with
        the probability of an object as weight, the share of class k becomes ``p_k exp(strength * s_k)``, normalised.

        Args:
            features: (B, d, h, w), the encoder's last.
            semantic_logits: (B, C, h, w), raw; channel 0 is background.

        Returns:
            (B, C, h, w) float32, raw.
        """
        background, classes = semantic_logits[:, :1].float(), semantic_logits[:, 1:].float()
        scores = F.conv2d(features.float(), self.weight, self.bias)  # (B, K, h, w)
        objects = torch.sigmoid(_log_sum_exp(classes) - background)
        scores = self._averaged(scores * objects) / self._averaged(objects).clamp(min=1e-6)
        corrected = classes + self.strength * scores
        return torch.cat([background, corrected + (_log_sum_exp(classes) - _log_sum_exp(corrected))], dim=1)

    def _averaged(self, maps: Tensor) -> Tensor:
        return F.avg_pool2d(maps, self.window, stride=1, padding=self.window // 2)

    @torch.no_grad()
    def fit(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Take up the classes of the last step; those of earlier steps keep their statistics.

        Every image counts once for each class that it shows, however large the object.

        Args:
            batches: features (B, d, h, w) of all images, and for each cell its class or ``NO_CLASS`` (B, h, w).
        """
        exact = torch.float32 if self.covariance.device.type == "mps" else torch.float64  # MPS has nothing longer
        num_images = torch.zeros_like(self.num_images, dtype=exact)
        sums = torch.zeros_like(self.class_means, dtype=exact)
        moment = torch.zeros_like(self.covariance, dtype=exact)
        for features, labels in batches:
            images, rows, columns = (labels >= self.num_old_classes).nonzero(as_tuple=True)
            cells = features[images, :, rows, columns].to(exact)  # (N, d)
            regions = images * len(num_images) + labels[images, rows, columns]  # (N,), one number per image and class
            areas = torch.bincount(regions, minlength=len(labels) * len(num_images))
            weighted = cells / areas[regions, None]
            num_images += (areas > 0).view(len(labels), -1).sum(0)
            sums.index_add_(0, regions % len(num_images), weighted)
            moment += weighted.T @ cells
        means = sums / num_images.clamp(min=1)[:, None]
        scatter = moment - (means * num_images[:, None]).T @ means
        num_old = self.num_images[: self.num_old_classes].sum().to(exact)
        total = (num_old + num_images.sum()).clamp(min=1)
        self.covariance.copy_((self.covariance.to(exact) * num_old + scatter) / total)
        new = slice(self.num_old_classes, None)
        self.class_means[new], self.num_images[new] = means[new].float(), num_images[new].float()
        self._solve()

    @torch.no_grad()
    def load_previous(self, statistics: Mapping[str, Tensor]) -> None:
        """Take over the statistics of the classes of earlier steps.

        Args:
            statistics: ``state_dict`` of the discriminant of the step before.

        Raises:
            RunError: there are none, or they belong to other classes or to another encoder.
        """
        if not statistics:
            raise RunError(
                "the previous step has no class statistics, which recipe.network.discriminant needs; train it with "
                "recipe.network.discriminant above 0 as well, or set it to 0 for this step"
            )
        means = statistics["class_means"]
        if means.shape != (self.num_old_classes, len(self.covariance)):
            raise RunError(
                f"the previous step has class statistics of shape {tuple(means.shape)}, expected "
                f"{(self.num_old_classes, len(self.covariance))}"
            )
        self.class_means[: self.num_old_classes] = means
        self.num_images[: self.num_old_classes] = statistics["num_images"]
        self.covariance.copy_(statistics["covariance"])

    def _solve(self) -> None:
        """Compute weight ``S^-1 m_k`` and bias ``-m_k S^-1 m_k / 2``, less their means: only differences count.

        Classes without statistics get the mean.
        """
        known = self.num_images > 0
        if not known.any():
            return
        covariance, means = self.covariance.cpu().double(), self.class_means[known].cpu().double()
        spread = _SHRINKAGE * covariance.diagonal().mean().clamp(min=1e-12)
        covariance = covariance + spread * torch.eye(len(covariance), dtype=torch.float64)
        weight = torch.linalg.solve(covariance, means.T).T  # (known classes, d)
        bias = -(weight * means).sum(1) / 2
        self.weight.zero_()
        self.bias.zero_()
        self.weight[known] = (weight - weight.mean(0)).float().to(self.weight.device)[:, :, None, None]
        self.bias[known] = (bias - bias.mean()).float().to(self.bias.device)


def _log_sum_exp(maps: Tensor) -> Tensor:
    """Return (B, 1, h, w) in operators that every runtime has."""
    largest = maps.amax(1, keepdim=True)
    return largest + (maps - largest).exp().sum(1, keepdim=True).log()
