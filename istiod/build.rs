//! Compiles the messages between members, those that they store, and the admin API, without a protobuf compiler on the
//! machine.

use protox::prost::Message as _;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto");
    let files = protox::compile(["raft.proto", "peers.proto"], ["proto"])?;
    tonic_prost_build::configure().bytes(".").compile_fds(files)?;
    let admin = protox::compile(["admin.proto"], ["proto"])?;
    let out = std::env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?;
    std::fs::write(std::path::Path::new(&out).join("admin.bin"), admin.encode_to_vec())?;
    tonic_prost_build::configure().build_server(false).btree_map(".").compile_fds(admin)?;
    Ok(())
}
