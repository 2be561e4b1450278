"""One table of all rewards: what each measures, what it needs, and what is proved of it.

The names of run files, `rewards.BUILTIN`, `rewardtune ls rewards` and what the classes download derive from it. Data
only: it imports no network and no torch, so a list answers at once; tests hold it against the classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a checkpoint lives: a hub id, a local folder, or the URL of a folder of files.

    revision: of the hub. files: what is read there. sha256, md5: by file name, where known. licence, size: for
    `rewardtune ls rewards`. setting: of the reward, the one that takes a local copy instead.
    """

    repo: str
    revision: str = "main"
    files: tuple[str, ...] = ()
    sha256: Mapping[str, str] = field(default_factory=dict)
    md5: Mapping[str, str] = field(default_factory=dict)
    licence: str = ""
    size: str = ""
    setting: str = "model"

    def by_hand(self) -> str:
        """What to do on a machine without network."""
        if "://" in self.repo:
            return f"download {' '.join(map(self.url, self.files))}, then {self.setting}=PATH"
        return f"{self.command}, then {self.setting}=./{self._folder}"

    def url(self, file: str) -> str:
        """Of a file in a folder that is a URL."""
        return f"{self.repo.rstrip('/')}/{file}"

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
    weights: tuple[Source, ...] = ()
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

LAION = Source(
    repo="laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    revision="1c2b8495b28150b8a4922ee1c8edee224c284c0c",
    files=("config.json", "model.safetensors", *_PROCESSOR),
    licence="MIT",
    size="3.9 GB",
)
LAION_PROCESSOR = replace(LAION, files=_PROCESSOR, size="4 MB", setting="processor")
PICKSCORE = Source(
    repo="yuvalkirstain/PickScore_v1",
    revision="a4e4367c6dfa7288a00c550414478f865b875800",
    files=("config.json", "model.safetensors"),
    licence="MIT (GitHub)",
    size="3.9 GB",
)
HPS_FILES = {"2.0": "HPS_v2_compressed.pt", "2.1": "HPS_v2.1_compressed.pt"}
HPS = Source(
    repo="xswu/HPSv2",
    revision="697403c78157020a1ae59d23f111aa58ced35b0a",
    files=(HPS_FILES["2.1"],),  # of the default version
    sha256={HPS_FILES["2.1"]: "c57a38fb4a2f7e7c15bf00da2ea377cdf165448b4dd1052a484c215a998c9837"},
    md5={
        HPS_FILES["2.0"]: "fd9180de357abf01fdb4eaad64631db4",
        HPS_FILES["2.1"]: "4067542e34ba2553a738c5ac6c1d75c0",
    },
    licence="Apache-2.0",
    size="2.0 GB",
)
OPENAI = Source(
    repo="openai/clip-vit-large-patch14",
    revision="32bd64288804d66eefd0ccbe215aa642df71cc41",
    files=("config.json", "model.safetensors", "preprocessor_config.json"),
    licence="MIT",
    size="1.7 GB",
)
AESTHETIC_HEAD = Source(
    repo="https://raw.githubusercontent.com/christophschuhmann/improved-aesthetic-predictor/6934dd81792f086e613a121dbce43082cb8be85e",
    files=("sac+logos+ava1-l14-linearMSE.pth",),
    sha256={"sac+logos+ava1-l14-linearMSE.pth": "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"},
    licence="Apache-2.0",
    size="4 MB",
    setting="head",
)
IMAGEREWARD = Source(
    repo="THUDM/ImageReward",
    revision="5736be03b2652728fb87788c9797b0570450ab72",
    files=("ImageReward.pt", "med_config.json"),
    licence="Apache-2.0",
    size="1.8 GB",
)
BERT = Source(
    repo="bert-base-uncased",
    revision="86b5e0934494bd15c9632b12f734a8a67f723594",
    files=("tokenizer.json", "tokenizer_config.json", "vocab.txt"),
    licence="Apache-2.0",
    size="1 MB",
    setting="tokenizer",
)
OWLVIT = Source(
    repo="google/owlvit-base-patch32",
    revision="cbc355fb364588351c5d51c7f74465e8e7ec6f72",
    files=("config.json", "pytorch_model.bin", *_PROCESSOR),
    licence="Apache-2.0",
    size="0.6 GB",
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
        weights=(LAION,),
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
        weights=(PICKSCORE, LAION_PROCESSOR),
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
        weights=(HPS, LAION_PROCESSOR),
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
        weights=(OPENAI, AESTHETIC_HEAD),
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
        weights=(IMAGEREWARD, BERT),
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
        weights=(OWLVIT,),
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
        meaning="size of the image as a JPEG file",
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

OBJECT = "book"  # objectness looks for it unless told otherwise: DRTune's example

CATALOGUE = {entry.name: entry for entry in REWARDS}
