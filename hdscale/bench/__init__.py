"""The benchmarks behind every performance figure."""
