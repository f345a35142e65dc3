"""`python -m benchmarks.peers`; its jobs run in processes that import `peers.runs`, which a `__main__` they could not."""

from peers.runs import main

if __name__ == "__main__":
    main()
