//! herd-tests
