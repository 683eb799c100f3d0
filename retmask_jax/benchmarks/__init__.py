"""`retmask bench`: our library and the tools of others on the same task, with the ratio of their times. No stage and no
part of the library uses these modules."""
