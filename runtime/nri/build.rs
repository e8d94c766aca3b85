//! Generates the messages with a pure-Rust protobuf compiler, so that no `protoc` is needed on the machine. Maps keep the
//! order of their keys, so that what plugins ask for is carried out in the same order each time.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    for file in ["proto/nri.proto", "proto/ttrpc.proto"] {
        println!("cargo:rerun-if-changed={file}");
        prost_build::Config::new().btree_map(["."]).compile_fds(protox::compile([file], ["."])?)?;
    }
    Ok(())
}
