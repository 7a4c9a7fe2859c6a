"""Benchmarks and the plain implementations they compare with; also `covidmtl_core.benchmarks`."""
