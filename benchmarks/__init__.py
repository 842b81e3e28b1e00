"""What Patchbay's speed is measured by: one fixed workload per figure, beside its peers, in one run (``make bench``).

`figures` holds the workloads, `harness` runs them in turns across processes, `samples` is what a run leaves behind,
`table`, `picture` and `page` show it. Standard library only up to here: workers in other environments import it too.
"""
