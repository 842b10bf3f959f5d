//! Names and units shared by every crate.
//!
//! An id is a name, not a number: it has an order (so that maps iterate in a fixed order and a
//! seed replays) but no arithmetic. Counters that have a next one say so with `next`.

use std::fmt;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $repr:ty, $letter:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub $repr);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($letter, "{}"), self.0)
            }
        }

        // Golden traces print ids many times per line: `w2`, not `WorkerId(2)`.
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
    };
}

macro_rules! next {
    ($name:ident) => {
        impl $name {
            /// The one after this one.
            #[must_use]
            pub fn next(self) -> Self {
                Self(self.0 + 1)
            }
        }
    };
}

id!(
    /// One worker process, which owns exactly one device. Given by the coordinator at registration.
    WorkerId, u32, "w"
);
id!(
    /// A worker's index in the current view, `0..ranks`.
    Rank, u16, "r"
);
id!(
    /// A *logical* expert of one MoE layer, `0..num_local_experts` of the checkpoint's config.
    ExpertId, u16, "e"
);
id!(
    /// Generation of the view. What carries an older epoch is dropped, never obeyed.
    Epoch, u64, "n"
);
id!(
    /// One lockstep forward pass of all ranks. Counts up within a router's life.
    StepId, u64, "s"
);
id!(
    /// One stream of tokens. A request with `n = 2` has two.
    SeqId, u64, "q"
);
id!(
    /// A page of the KV cache of one rank, in one of its two pools (see `scheduler`).
    BlockId, u32, "b"
);

next!(Epoch);
next!(StepId);
next!(SeqId);

impl Rank {
    /// The index into per-rank slices.
    #[must_use]
    pub fn index(self) -> usize {
        usize::from(self.0)
    }
}

impl ExpertId {
    /// The index into per-expert slices.
    #[must_use]
    pub fn index(self) -> usize {
        usize::from(self.0)
    }
}

impl BlockId {
    /// The index into per-block slices.
    #[must_use]
    pub fn index(self) -> usize {
        self.0 as usize
    }
}
