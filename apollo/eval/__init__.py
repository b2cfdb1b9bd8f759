"""Ask many questions, count the right answers, and say how sure the count is.

What is asked: `questions`, `benchmarks` (the public ones), `subtitles`. Who answers: `answerers`,
with `local` (an Apollo model), `huggingface` and `api`; `prompts` is what they read. `runner` asks,
stops and resumes, `run_folder` keeps predictions on disk. `parsing`, `scoring` and `compare` turn
them into accuracies with intervals, `report` draws them. `lmms_eval` is for that harness. Start at
`runner.evaluate`, or at docs/evaluation.md.
"""
