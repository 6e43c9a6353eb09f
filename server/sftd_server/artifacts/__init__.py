"""What jobs read and make, beyond the data folder: to and from workers without it, and in a store such as S3."""
