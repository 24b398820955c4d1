"""From a model to the paper's tables: the benchmarks' data, lm-eval as the engine, the tables.

`prepare` writes everything that an evaluation needs into one folder, where there is a network;
`run` reads that folder and a model and nothing else.
"""
