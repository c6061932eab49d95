"""One file a job: a request in, a result out."""
