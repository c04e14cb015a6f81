"""A sweep as data, its plan, the worker processes that train its runs, and what is seen of them meanwhile."""
