// The rows of a step as all ranks of a device see them: where they lie, which expert each wants, and who serves it.

struct Span {
  u32 first, count;
};

struct Target {
  u16 rank, slot;
  u32 until;
};

// One rank's rows. `SOURCE_BYTES` on the host.
template <class Row>
struct SourceOf {
  const u16* wanted;  // [count]
  const Row* rows;    // [count, hidden]
  Row* results;       // [count, hidden]
  const Span* spans;  // [layers, experts]: where an expert's targets begin, and how many there are
  // Row i has the point start + i * kStride; the expert's first target until beyond it serves the row, or else its last.
  const Target* targets;
  u32 count, experts, start;
};

struct RowOfSource {
  u32 source, row;
};
