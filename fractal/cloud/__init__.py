"""Lambda Cloud: the API, instances and their ledger, the machine over SSH, and the tasks that join it with images."""
