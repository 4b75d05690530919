"""`make check-deploy`: every file of deploy/ held to the tool it is written for, where that tool can be had."""
