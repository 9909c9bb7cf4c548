"""What a sweep can be asked to do by name, without the libraries that do it."""

SAMPLERS = ("auto", "tpe", "nsga2", "gp", "qmc", "random", "grid")
AUTO_TPE_TRIALS = 150
"""`auto` is tpe for so many trials, then nsga2. On a measured space (tests/benchmarks/samplers.py) tpe finds most, but
an ask costs it tens of milliseconds and more with every trial; nsga2 beats random from 32 trials on, at a flat cost."""
