//! all2all
