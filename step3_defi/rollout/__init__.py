"""Rolling a policy out in many simulators, and the statistics and diagnoses of its journal (Sec. 4.2, App. Q9).

`simulators` runs the processes; each of them is a `worker`, which the parent holds by a `handle` and exchanges
`messages` with. `journal` keeps the results, `stats` evaluates them, `replay` and `diagnosis` look for the causes of
failures.
"""
