"""The paper's experiments, behind `rewardtune bench`: at equal compute, over seeds, one JSON row for every run.

    setting.py      on which model, with which rewards, prompts, budget and learning rates: `playground`, `sd15`
    cost.py         what a plan costs in denoiser evaluations, a backward counted as measured
    cells.py        one run: tune until the budget is used up, judge on held-out prompts, give a row
    rows.py         the rows on disk; what stands there is not run again
    work.py         missing cells, dealt out to processes and devices; the learning rate chosen per method
    claims.py       a claim, our figure, the spread over seeds, the verdict
    table1.py, ablations.py, gradients.py, pictures.py   what each experiment runs and says
    plots.py        curves and bars

Every experiment prints claim, figure, spread and verdict (holds, fails, cannot be told here) and "not run" for what is
missing, so a report can be made at any time.
"""
