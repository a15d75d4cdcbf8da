"""A pool of processes for tests that need none."""


class Here:
    """Stands for the module concurrent: its pool runs everything at once in this process."""

    class futures:
        class ProcessPoolExecutor:
            def __init__(self, *arguments, **options):
                pass

            def __enter__(self):
                return self

            def __exit__(self, *error):
                pass

            def submit(self, function, *arguments):
                return Done(function(*arguments))

        as_completed = staticmethod(list)


class Done:
    def __init__(self, value):
        self.value = value

    def result(self):
        return self.value
