"""One table of all rewards: what each measures, what it needs, and what is proved of it.

The names of run files, `rewards.BUILTIN` and `rewardtune ls rewards` derive from it. Data only: it imports no network
and no torch, so a list answers at once; tests hold it against the classes.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Files of one repository that a reward downloads on first use.

    repo: a Hugging Face hub id, or a URL. setting: the setting of the reward that takes a local copy instead.
    """

    repo: str
    files: tuple[str, ...]
    licence: str
    size: str
    revision: str = "main"
    setting: str = "model"

    def by_hand(self) -> str:
        """What to do on a machine without network."""
        if "://" in self.repo:
            fetch = " ".join(f"{self.repo.rstrip('/')}/{file}" for file in self.files)
            return f"download {fetch}, then {self.setting}=PATH"
        return f"{self.command}, then {self.setting}=./{self._folder}"

    @property
    def command(self) -> str:
        """Downloads from the hub what is read of it and no more, which for some is a quarter."""
        revision = "" if self.revision == "main" else f" --revision {self.revision}"
        return f"hf download {self.repo} {' '.join(self.files)}{revision} --local-dir {self._folder}"

    @property
    def _folder(self) -> str:
        return self.repo.rstrip("/").rpartition("/")[2]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One reward: a row of `rewardtune ls rewards`."""

    name: str  # in run files and logs
    path: str  # "module:Class"
    meaning: str  # of the native value, in a line
    range: str  # of the native value
    better: Literal["more", "less"]
    oracle: str  # what it is proved against; empty where it is not
    proof: str  # what is proved; without an oracle, why nothing is
    weights: tuple[Weights, ...] = ()
    differentiable: bool = True
    reads_prompt: bool = False
    note: str = ""

    @property
    def status(self) -> str:
        """Of the proof, in a few words."""
        if not self.oracle:
            return f"unproved: {self.proof}"
        return f"proved: {self.oracle}" + (", equal random weights" if self.weights else "")

    @property
    def size(self) -> str:
        """On disk, of the network; tokenizers and heads add a few MB."""
        return self.weights[0].size if self.weights else "-"

    @property
    def licence(self) -> str:
        """Of the networks and heads; the code is this package's own (Apache-2.0)."""
        networks = [source for source in self.weights if source.setting in ("model", "head")]
        return ", ".join(dict.fromkeys(source.licence for source in networks)) or "-"


_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
_PROCESSOR = (*_TOKENIZER, "preprocessor_config.json")
_LAION = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
_LAION_COMMIT = "1c2b8495b28150b8a4922ee1c8edee224c284c0c"
_LAION_PROCESSOR = Weights(
    repo=_LAION, revision=_LAION_COMMIT, files=_PROCESSOR, licence="MIT", size="4 MB", setting="processor"
)

REWARDS = (
    Entry(
        name="clipscore",
        path="rewardtune.rewards.clip:CLIPScore",
        meaning="cosine of image and prompt (OpenCLIP ViT-H)",
        range="0.2 to 0.4",
        better="more",
        oracle="open_clip",
        proof="score and gradient on equal random weights",
        reads_prompt=True,
        weights=(
            Weights(
                repo=_LAION,
                revision=_LAION_COMMIT,
                files=("config.json", "model.safetensors", *_PROCESSOR),
                licence="MIT",
                size="3.9 GB",
            ),
        ),
    ),
    Entry(
        name="pickscore",
        path="rewardtune.rewards.clip:PickScore",
        meaning="cosine of image and prompt (ViT-H tuned on human choices, Pick-a-Pic)",
        range="0.18 to 0.25",
        better="more",
        oracle="transformers",
        proof="score and gradient on equal random weights",
        reads_prompt=True,
        weights=(
            Weights(
                repo="yuvalkirstain/PickScore_v1",
                revision="a4e4367c6dfa7288a00c550414478f865b875800",
                files=("config.json", "model.safetensors"),
                licence="MIT (GitHub)",
                size="3.9 GB",
            ),
            _LAION_PROCESSOR,
        ),
        note="papers print the cosine, or exp(logit_scale) * cosine, about 100 times as much; "
        "MIT is the licence of its GitHub repository, the hub's card has no licence field",
    ),
    Entry(
        name="hpsv2",
        path="rewardtune.rewards.clip:HPSv2",
        meaning="cosine of image and prompt (ViT-H tuned on human preference, HPD v2)",
        range="0.1 to 0.4",
        better="more",
        oracle="hpsv2",
        proof="score and gradient on equal random weights; its letterbox",
        reads_prompt=True,
        weights=(
            Weights(
                repo="xswu/HPSv2",
                revision="697403c78157020a1ae59d23f111aa58ced35b0a",
                files=("HPS_v2.1_compressed.pt",),
                licence="Apache-2.0",
                size="2.0 GB",
            ),
            _LAION_PROCESSOR,
        ),
        note="versions 2.1 (default) and 2.0; papers print it times 100",
    ),
    Entry(
        name="aesthetic",
        path="rewardtune.rewards.aesthetic:Aesthetic",
        meaning="human rating of the image alone (LAION's predictor v2 on CLIP ViT-L/14)",
        range="1 to 10",
        better="more",
        oracle="openai-clip",
        proof="score and gradient on equal random weights; the MLP head as one affine map",
        weights=(
            Weights(
                repo="openai/clip-vit-large-patch14",
                revision="32bd64288804d66eefd0ccbe215aa642df71cc41",
                files=("config.json", "model.safetensors", "preprocessor_config.json"),
                licence="MIT",
                size="1.7 GB",
            ),
            Weights(
                repo="https://raw.githubusercontent.com/christophschuhmann/improved-aesthetic-predictor/6934dd81792f086e613a121dbce43082cb8be85e",
                files=("sac+logos+ava1-l14-linearMSE.pth",),
                licence="Apache-2.0",
                size="4 MB",
                setting="head",
            ),
        ),
        note="nominal: the head is affine and unbounded",
    ),
    Entry(
        name="imagereward",
        path="rewardtune.rewards.imagereward:ImageReward",
        meaning="human ranking, standardised (a BLIP that reads image and prompt together)",
        range="-2.5 to 2.5",
        better="more",
        oracle="image-reward",
        proof="score and gradient on equal random weights",
        reads_prompt=True,
        weights=(
            Weights(
                repo="THUDM/ImageReward",
                revision="5736be03b2652728fb87788c9797b0570450ab72",
                files=("ImageReward.pt", "med_config.json"),
                licence="Apache-2.0",
                size="1.8 GB",
            ),
            Weights(
                repo="bert-base-uncased",
                revision="86b5e0934494bd15c9632b12f734a8a67f723594",
                files=("tokenizer.json", "tokenizer_config.json", "vocab.txt"),
                licence="Apache-2.0",
                size="1 MB",
                setting="tokenizer",
            ),
        ),
    ),
    Entry(
        name="objectness",
        path="rewardtune.rewards.objectness:Objectness",
        meaning="probability of the best box for one named object (OWL-ViT)",
        range="0 to 1",
        better="less",
        oracle="transformers",
        proof="score and gradient on equal random weights, against the full forward pass",
        note="optimised before the sigmoid, which saturates",
        weights=(
            Weights(
                repo="google/owlvit-base-patch32",
                revision="cbc355fb364588351c5d51c7f74465e8e7ec6f72",
                files=("config.json", "pytorch_model.bin", *_PROCESSOR),
                licence="Apache-2.0",
                size="0.6 GB",
            ),
        ),
    ),
    Entry(
        name="symmetry",
        path="rewardtune.rewards.pixels:Symmetry",
        meaning="mean |I - mirror(I)| / std(I), DRTune eq. 6",
        range="0 to 1.2",
        better="less",
        oracle="by hand",
        proof="value, gradient by finite differences, invariances",
        note="detach_std=True closes its loophole (docs/rewards.md)",
    ),
    Entry(
        name="compressibility",
        path="rewardtune.rewards.pixels:Compressibility",
        meaning="mean (I - JPEG(I))^2, DRTune eq. 7",
        range="1e-4 to 1e-2",
        better="less",
        oracle="Pillow",
        proof="PSNR to the real codec, gradient by finite differences of the true error",
    ),
    Entry(
        name="jpeg_bytes",
        path="rewardtune.rewards.pixels:JPEGBytes",
        meaning="size of the image as a JPEG file (no gradient)",
        range="bytes",
        better="less",
        oracle="Pillow",
        proof="the number of bytes",
        note="for the log: give it the weight 0",
        differentiable=False,
    ),
    Entry(
        name="brightness",
        path="rewardtune.rewards.pixels:Brightness",
        meaning="mean of all pixels",
        range="0 to 1",
        better="more",
        oracle="by hand",
        proof="value",
    ),
    Entry(
        name="colour",
        path="rewardtune.rewards.pixels:Colour",
        meaning="mean squared distance of all pixels to one colour",
        range="0 to 1",
        better="less",
        oracle="by hand",
        proof="value",
    ),
)

CATALOGUE = {entry.name: entry for entry in REWARDS}
