"""Checkers whose weights are a local folder of the operator's. Only safetensors are read; nothing is downloaded.

`folder`: any image classifier that transformers can load, for example `Falconsai/nsfw_image_detection`, which FLUX's
authors use at a threshold of 0.85. `compvis`: Stable Diffusion's checker, `CompVis/stable-diffusion-safety-checker`.
A folder of either holds:

    config.json
    preprocessor_config.json
    model.safetensors
"""

from pathlib import Path
from typing import Any

from PIL import Image

from pipelines.errors import SafetyUnavailable
from pipelines.safety.open_nsfw import canaries

UNSAFE = frozenset({"nsfw", "unsafe", "porn", "hentai", "explicit", "sexual", "nude", "lewd"})  # labels, in lower case
LOCAL = {"local_files_only": True, "trust_remote_code": False}
NEVER = 2.0  # no cosine similarity reaches it


def check_folder(folder: str) -> Path:
    """The folder's path. Raises `SafetyUnavailable` where one of the three files is missing."""
    path = Path(folder)
    missing = [name for name in ("config.json", "preprocessor_config.json") if not (path / name).is_file()]
    if not any(path.glob("*.safetensors")):
        missing.append("model.safetensors")
    if missing:
        raise SafetyUnavailable(f"{path} is not a checker's folder: {', '.join(missing)} missing")
    return path


class Classifier:
    """A transformers image classifier. The score is the probability of all unsafe labels together."""

    def __init__(self, folder: str, labels: tuple[str, ...] = (), device: str = "cpu") -> None:
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        path = check_folder(folder)
        self._processor = AutoImageProcessor.from_pretrained(path, backend="pil", **LOCAL)
        model = AutoModelForImageClassification.from_pretrained(path, use_safetensors=True, **LOCAL)
        self._model = model.eval().requires_grad_(False).to(device)
        self._unsafe = find_unsafe_labels(self._model.config.id2label, labels)
        self.name = f"folder ({path.name})"

    def score(self, picture: Image.Image) -> float:
        probabilities = self._logits(picture).float().softmax(-1)
        return min(1.0, float(probabilities[self._unsafe].sum()))  # rounding can reach beyond 1

    def self_test(self) -> None:
        """Two different pictures get different scores, and the same picture gets the same score twice."""
        first, second = canaries()
        one, again, other = (self._logits(picture) for picture in (first, first, second))
        if not (one.isfinite().all() and one.equal(again) and not one.equal(other)):
            raise SafetyUnavailable(f"{self.name} does not tell two different pictures apart")

    def _logits(self, picture: Image.Image) -> Any:
        inputs = self._processor(picture.convert("RGB"), return_tensors="pt").to(self._model.device)
        return self._model(**inputs).logits[0]


def find_unsafe_labels(names: dict[int, str], wanted: tuple[str, ...]) -> list[int]:
    """Indices of the labels that count as unsafe: those the operator names, else those of well-known names."""
    lower = {index: name.lower() for index, name in names.items()}
    known = {name.lower() for name in wanted} or UNSAFE
    found = [index for index, name in lower.items() if name in known]
    unknown = known - set(lower.values()) if wanted else set()
    if unknown or not found or len(found) == len(names):
        listed = ", ".join(names.values())
        raise SafetyUnavailable(f"set SRPO_SAFETY_LABELS to the unsafe ones of the classifier's labels: {listed}")
    return found


class CompVis:
    """Stable Diffusion's checker: CLIP's picture embedding beside 17 hidden concepts. The score is 1 or 0."""

    def __init__(self, folder: str, device: str = "cpu") -> None:
        from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
        from transformers import CLIPImageProcessor

        path = check_folder(folder)
        self._processor = CLIPImageProcessor.from_pretrained(path, **LOCAL)
        model = StableDiffusionSafetyChecker.from_pretrained(path, use_safetensors=True, local_files_only=True)
        self._model = model.eval().requires_grad_(False).to(device)
        self.name = f"compvis ({path.name})"

    def score(self, picture: Image.Image) -> float:
        import numpy as np

        if not self.embed(picture).isfinite().all():
            raise SafetyUnavailable(f"{self.name} answered non-finite numbers")
        dummy = [np.zeros((1, 1, 3), dtype=np.uint8)]  # the class blackens flagged images; the guard does that here
        _, (flagged,) = self._model(clip_input=self._inputs(picture), images=dummy)
        return float(flagged)

    def embed(self, picture: Image.Image) -> Any:
        """The picture's CLIP embedding, one row."""
        return self._model.visual_projection(self._model.vision_model(self._inputs(picture))[1])

    def enrol(self, picture: Image.Image, unlike: Image.Image) -> None:
        """Make `picture` the only concept, with a threshold midway between itself and `unlike`."""
        from torch.nn.functional import cosine_similarity

        concept = self.embed(picture)
        self._model.concept_embeds_weights.fill_(NEVER)
        self._model.special_care_embeds_weights.fill_(NEVER)
        self._model.concept_embeds[0] = concept[0]
        self._model.concept_embeds_weights[0] = (1 + cosine_similarity(concept, self.embed(unlike)).item()) / 2

    def self_test(self) -> None:
        """Enrol a harmless picture as a concept for a moment: it must be flagged, and its twin must not."""
        saved = {name: value.clone() for name, value in self._model.state_dict().items() if "_embeds" in name}
        first, second = canaries()
        self.enrol(first, second)
        scores = (self.score(first), self.score(second))
        self._model.load_state_dict(saved, strict=False)
        if scores != (1.0, 0.0):
            raise SafetyUnavailable(f"{self.name} does not recognise a concept that was enrolled")

    def _inputs(self, picture: Image.Image) -> Any:
        return self._processor(picture.convert("RGB"), return_tensors="pt").pixel_values.to(self._model.device)
