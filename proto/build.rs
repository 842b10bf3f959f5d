//! Generates the gRPC code with protox, so that no protoc is needed on the machine.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=herd/v1/herd.proto");
    let descriptors = protox::compile(["herd/v1/herd.proto"], ["."])?;
    // Weights are passed on without another copy.
    tonic_prost_build::configure().bytes(".herd.v1.ExpertPiece").compile_fds(descriptors)?;
    Ok(())
}
