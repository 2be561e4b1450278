"""Roll out a plan through the user's own pipeline and back-propagate a loss through it, exactly.

    with rollout(pipe, plan, prompt=prompts, num_inference_steps=50) as tape:
        loss = -reward(tape.images, tape.prompts).mean()
        tape.backward(loss)                      # trained parameters now hold .grad

Peak activation memory is that of the reward, of the decoder, or of one network call - whichever is largest - whatever
the number of trained steps, because each trained call is replayed, back-propagated and forgotten by itself.
"""

from rewardtune.engine.chain import count_steps, rollout
from rewardtune.engine.doors import find_denoiser, quiet
from rewardtune.engine.preflight import Facts, preflight
from rewardtune.engine.tape import Sweep, Tape

__all__ = ["Facts", "Sweep", "Tape", "count_steps", "find_denoiser", "preflight", "quiet", "rollout"]
