//! Generates the CRI client and server from `cri/v1/api.proto` with a pure-Rust protobuf compiler, so that no
//! `protoc` is needed on the machine.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=cri/v1/api.proto");
    let descriptors = protox::compile(["cri/v1/api.proto"], ["."])?;
    tonic_prost_build::configure().build_client(true).build_server(true).compile_fds(descriptors)?;
    Ok(())
}
