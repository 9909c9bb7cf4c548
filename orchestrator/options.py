"""What a sweep can be asked to do by name, without the libraries that do it."""

SAMPLERS = ("auto", "tpe", "nsga2", "gp", "qmc", "random", "grid")
AUTO_TPE_TRIALS = 150
"""`auto` is tpe for so many trials, then nsga2: see tests/benchmarks/samplers.py."""
