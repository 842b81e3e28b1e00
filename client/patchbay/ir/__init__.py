"""The intervention graph as pure data: nodes, operations, sites, rules, prices. Standard library only."""
