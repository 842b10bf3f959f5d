//! Golden and invariance tests of the whole engine; the cases lie in `golden/`.

pub mod rng;
