"""Lambda Cloud: a typed client, an instance's life and the ledger, ssh and jobs. Knows no image and no stage."""
