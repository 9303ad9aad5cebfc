"""How good samples of digits are: by a small classifier that was trained on the real ones.

    modes             digits that at least 1 % of the samples show, with a probability of 0.9 or more
    effective modes   exp of the entropy of how often each digit is the most probable one; 10 where all are as frequent
    Frechet distance  |m1 - m2|^2 + trace(S1 + S2 - 2 (S1 S2)^(1/2)) of means and covariances of the classifier's
                      features, samples against the test images (as the FID, with another network)
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from generative_data import Digits
from safetensors.torch import load_file
from torch import Tensor, nn

from kit.progress import Progress
from kit.stop import Stop
from pykernels.models.files import save_tensors

FEATURES = 64
SHARE, SURE = 0.01, 0.9


class Classifier(nn.Module):
    """Ten logits of images [B, 28, 28] in [0, 1], and the features [B, 64] before them."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 16, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, 2, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 49, FEATURES),
            nn.ReLU(),
        )
        self.last = nn.Linear(FEATURES, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk(images.unsqueeze(1))
        return self.last(features), features


def of_all(classifier: Classifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities and features in float64, of uint8 images or of those in [0, 1]."""
    parts = []
    with torch.no_grad():
        for part in images.split(1000):
            parts.append(classifier(part / 255 if part.dtype == torch.uint8 else part))
    logits, features = (torch.cat(t).double() for t in zip(*parts, strict=True))
    return logits.softmax(-1), features


def train_classifier(digits: Digits, epochs: int, seed: int, progress: Progress, stop: Stop) -> Classifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = Classifier()
        optimizer = torch.optim.Adam(classifier.parameters(), lr=2e-3)
        for epoch in range(epochs):
            order = torch.randperm(len(digits.train)).split(128)
            for i, chosen in enumerate(order):
                stop.check()
                loss = F.cross_entropy(classifier(digits.train[chosen] / 255)[0], digits.train_labels[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                progress.at(f"classifier, epoch {epoch + 1}/{epochs}, batch {i + 1}/{len(order)}")
    return classifier.eval()


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Of two sets of features [N, F] in float64."""
    covariances = [t.T.cov() for t in (a, b)]
    # trace((S1 S2)^(1/2)) is that of (R S2 R)^(1/2) with R = S1^(1/2), which is symmetric.
    values, vectors = torch.linalg.eigh(covariances[0])
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + covariances[0].trace() + covariances[1].trace() - 2 * cross
    return max(distance.item(), 0.0)


def modes(probabilities: Tensor) -> tuple[int, float]:
    """Modes and effective modes of samples with these probabilities [N, 10]."""
    sure, digit = probabilities.max(-1)
    shown = torch.bincount(digit[sure >= SURE], minlength=10)
    shares = torch.bincount(digit, minlength=10) / len(digit)
    return int((shown >= SHARE * len(digit)).sum()), torch.special.entr(shares).sum().exp().item()


class Judge:
    """Rates samples; the classifier is trained once and kept in the folder. accuracy: its, on the test images.

    floor: the Frechet distance of as many real training images, the least that samples can be expected to have.
    """

    def __init__(self, digits: Digits, folder: Path, epochs: int, samples: int, progress: Progress, stop: Stop) -> None:
        path = folder / "classifier.safetensors"
        self.classifier = Classifier().eval()
        if path.exists():
            self.classifier.load_state_dict(load_file(path))
        else:
            self.classifier = train_classifier(digits, epochs, 0, progress, stop)
            save_tensors(path, self.classifier.state_dict(), {})
        probabilities, self.features = of_all(self.classifier, digits.test)
        self.accuracy = (probabilities.argmax(-1) == digits.test_labels).double().mean().item()
        self.floor = frechet_distance(of_all(self.classifier, digits.train[:samples])[1], self.features)

    def rate(self, images: Tensor) -> dict[str, float]:
        """Of samples [N, 28, 28] in [0, 1]."""
        probabilities, features = of_all(self.classifier, images)
        count, effective = modes(probabilities)
        return {"modes": count, "effective": effective, "frechet": frechet_distance(features, self.features)}
