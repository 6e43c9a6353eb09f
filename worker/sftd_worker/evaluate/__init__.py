"""Running generated code and scoring it. Empty until execution is part of a job."""
