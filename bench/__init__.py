"""What `make bench` measures, each beside what it is compared with, in the same run."""
