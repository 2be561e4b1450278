"""Rewards made of rewards: hinges, targets, ensembles, and sums balanced by their gradients.

    1e-3 * hinge(ImageReward(), 2.0)                                # ReFL's relu(2 - r) * 1e-3
    minimum_of(standardise(a, mean=0.25, std=0.03), standardise(b, mean=0.21, std=0.02))
    balance(CLIPScore() + 0.2 * Symmetry())

They combine per image, nothing is shared over a batch, and the log keeps the native values of all that they are
made of. A level, target, mean or std is given as the log shows the reward: `hinge(Symmetry(), 0.3)` stops pushing when
symmetry has come down to 0.3; a weight goes outside, `0.5 * hinge(...)`. (Where score and log differ by more than a
sign, as for objectness: as the score.)
"""

import math
from numbers import Real

import torch
from torch import Tensor

from rewardtune.errors import ConfigError, RewardError
from rewardtune.rewards.base import Call, Composition, Reward, Scorer, as_reward


class _OfOne(Composition):
    def __init__(self, reward: Reward | Scorer) -> None:
        self.reward = as_reward(reward, action=f"build '{self.name}'")
        self.members = (self.reward,)


class Hinge(_OfOne):
    """score = -relu(level - r); with a reward to minimise -relu(r - level). Beyond the level there is no gradient."""

    def __init__(self, reward: Reward | Scorer, level: float) -> None:
        super().__init__(reward)
        self.sign, self.level = _sign("hinge", self.reward), _number("hinge", "level", level)
        self.name = f"hinge({self.reward.name}, {level:g})"

    def _measure(self, call: Call) -> Tensor:
        return -(self.sign * self.level - call.score(self.reward)).relu()


class Target(_OfOne):
    """score = -|r - value|: the reward is held at a value, from both sides."""

    def __init__(self, reward: Reward | Scorer, value: float) -> None:
        super().__init__(reward)
        self.sign, self.value = _sign("target", self.reward), _number("target", "value", value)
        self.name = f"target({self.reward.name}, {value:g})"

    def _measure(self, call: Call) -> Tensor:
        return -(call.score(self.reward) - self.sign * self.value).abs()


class Standardised(_OfOne):
    """score = (r - mean) / std, negated for a reward to minimise: 0 is usual, +1 is one std better than usual.

    mean, std: of the native value over pictures of the untuned model; fixed numbers, never those of the batch.
    """

    def __init__(self, reward: Reward | Scorer, *, mean: float, std: float) -> None:
        super().__init__(reward)
        self.sign = _sign("standardise", self.reward)
        self.mean, self.std = _number("standardise", "mean", mean), _number("standardise", "std", std)
        if self.std <= 0:
            raise ConfigError(f"standardise: std is {std!r}; legal is above 0: the spread of the native value")
        self.name = f"standardised({self.reward.name})"

    def _measure(self, call: Call) -> Tensor:
        return (call.score(self.reward) - self.sign * self.mean) / self.std


class Relative(_OfOne):
    """score = (1 + k) r(image, positive) - r(image, negative): SRPO's reward (Shen et al. 2025).

    Both are the image's own prompt in other words, `{}` being the prompt. Where r is the similarity of an image's and a
    text's features that is f_image . ((1 + k) f_positive - f_negative): what the reward likes in every picture cancels.
    The log keeps the score itself, as `relative(NAME)`: r of other words is not r of the prompt. Raises RewardError
    where r gives all images the same for both, which is what a reward does that does not read the prompt.
    """

    def __init__(self, reward: Reward | Scorer, positive: str, negative: str, *, k: float = 0.0) -> None:
        super().__init__(reward)
        self.k = _number("relative", "k", k)
        for name, words in (("positive", positive), ("negative", negative)):
            if not isinstance(words, str) or words.count("{}") != 1:
                raise ConfigError(
                    f"relative: {name} is {words!r}; legal is a text that holds {{}} once, for the prompt"
                )
        if positive == negative:
            raise ConfigError(f"relative: positive and negative are both {positive!r}: their difference says nothing")
        self.positive, self.negative = positive, negative
        self.name = f"relative({self.reward.name})"

    def _measure(self, call: Call) -> Tensor:
        positive, negative = (
            Call(call.images, [words.replace("{}", prompt) for prompt in call.prompts])
            for words in (self.positive, self.negative)
        )
        liked, disliked = positive.score(self.reward), negative.score(self.reward)
        if torch.equal(liked, disliked):
            raise RewardError(
                f"{self.name}: the same score for {self.positive!r} and {self.negative!r}, so it does not read the "
                "prompt; relative needs a reward that does (clipscore, pickscore, hpsv2, imagereward). Or the prompts "
                "are so long that the words behind {} are cut off: put them before {}"
            )
        score = (1 + self.k) * liked - disliked
        call.keep(self, score)
        return score


class _OfMany(Composition):
    def __init__(self, *rewards: Reward | Scorer) -> None:
        if len(rewards) < 2:
            raise ConfigError(f"{self.name}: {len(rewards)} rewards given; legal is two or more: {self.name}(a, b)")
        self.members = tuple(as_reward(reward, action=f"use in {self.name}") for reward in rewards)

    def _measure(self, call: Call) -> Tensor:
        score = self.join(torch.stack([call.score(member) for member in self.members]))
        call.keep(self, score)
        return score

    def join(self, scores: Tensor) -> Tensor:
        """(members, B) -> (B,)."""
        raise NotImplementedError


class Mean(_OfMany):
    """The members' mean, per image. An ensemble: the flaws that only one of them has count for less."""

    name = "mean_of"

    def join(self, scores: Tensor) -> Tensor:
        return scores.mean(dim=0)


class Minimum(_OfMany):
    """The worst member's score, per image: only what all of them like pays. Its gradient is that member's alone."""

    name = "minimum_of"

    def join(self, scores: Tensor) -> Tensor:
        return scores.amin(dim=0)


class Balance(_OfOne):
    """sum_k w_k r_k whose parts pull with equal strength: its *gradient* at the image is sum_k w_k f_k dr_k/dI.

    f_k = mean_j |dr_j/dI| / |dr_k/dI|, at most `limit`, per image and over the parts of weight other than 0: each part
    pulls with |w_k| times the mean norm, whatever its scale. Nothing depends on the other images of the batch, on
    micro-batches or on earlier updates. The value is the plain sum, with or without a gradient, so that the scores of
    different updates compare; it is no antiderivative of the balanced gradient.

    Each part is differentiated once, and its graph freed before the next part's begins: no dearer than the plain sum.
    """

    def __init__(self, reward: Reward | Scorer, *, limit: float = 1e4) -> None:
        super().__init__(reward)
        self.name = f"balance({self.reward.name})"
        self.limit = _number("balance", "limit", limit)
        if self.limit < 1:
            raise ConfigError(
                f"balance: limit is {limit!r}; legal is 1 or more: the largest factor on a part's gradient"
            )
        if sum(weight != 0 for weight, _ in self.reward.terms) < 2:
            raise ConfigError(
                f"balance: '{self.reward.name}' has fewer than two parts; legal is a sum such as a + 0.2 * b"
            )

    def _measure(self, call: Call) -> Tensor:
        if not (torch.is_grad_enabled() and call.images.requires_grad):
            return call.score(self.reward)
        images = call.images
        total, gradients = images.new_zeros(len(images)), []
        for weight, part in self.reward.terms:
            if weight != 0:
                score, gradient = _differentiate(part, call)
                total = total + weight * score
                gradients.append(gradient)
            else:
                with torch.no_grad():
                    call.score(part)
        weights = images.new_tensor([weight for weight, _ in self.reward.terms if weight != 0])
        pull = _balanced(torch.stack(gradients), weights, limit=self.limit)
        return total + ((images - images.detach()) * pull).sum(dim=(1, 2, 3))  # adds 0, with the gradient `pull`


def _differentiate(part: Reward, call: Call) -> tuple[Tensor, Tensor]:
    """Scores (B,) without a graph and their gradients (B, 3, H, W) at the images; native values are kept in `call`."""
    leaf = call.images.detach().requires_grad_()
    inner = Call(leaf, call.prompts)
    score = inner.score(part)
    if not score.requires_grad:
        raise RewardError(f"balance: '{part.name}' has no gradient; give it the weight 0 to log it only")
    (gradient,) = torch.autograd.grad(score.sum(), leaf, materialize_grads=True)
    for reward, native in inner.measured.values():
        call.keep(reward, native)
    return score.detach(), gradient


def _balanced(gradients: Tensor, weights: Tensor, *, limit: float) -> Tensor:
    """sum_k w_k f_k g_k, (K, B, 3, H, W) and (K,) -> (B, 3, H, W). A part without a gradient keeps the factor 1."""
    norms = gradients.flatten(2).norm(dim=-1)
    factors = torch.where(norms > 0, norms.mean(dim=0) / norms, 1.0).clamp(max=limit)
    return torch.einsum("k,kb,kbchw->bchw", weights, factors, gradients)


hinge, target, standardise, relative = Hinge, Target, Standardised, Relative
mean_of, minimum_of, balance = Mean, Minimum, Balance


def _sign(who: str, reward: Reward) -> float:
    """The score is sign * r, r as the log shows it. ConfigError where a weight alone has turned the one part's sign."""
    if len(reward.terms) == 1:
        ((weight, part),) = reward.terms
        if part is not reward and (weight < 0) != part.minimise:
            raise ConfigError(
                f"{who}: '{reward.name}' is scored with the other sign than '{part.name}' is logged, so no level can "
                f"be read off the log; put the weight outside: 0.5 * {who}(a, ...); less is better for a reward with "
                "`minimise = True`"
            )
    return -1.0 if reward.minimise else 1.0


def _number(who: str, setting: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ConfigError(f"{who}: {setting} is {value!r}; legal is a finite number")
    return float(value)
