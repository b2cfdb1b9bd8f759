"""Ask many questions, count the right answers, and say how sure the count is.

`benchmarks` reads questions, `answerers` answer them, `runner` keeps predictions on disk and can be
stopped and resumed, `scoring` turns predictions into accuracies with intervals, `report` draws
them. Start at `runner.evaluate`.
"""
