//! What one change of an object costs each member, once the log has it: decoding, applying, what the store is given, and
//! the next snapshot of the mesh.
//!
//! `cargo bench -p istiod --bench apply` prints it; `-- OBJECTS CHANGES` says how many objects there are and how often one of
//! them is overwritten with 1 KiB that is new.

use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use istiod::audit::Origin;
use istiod::publish::Publisher;
use istiod::raft::Command;
use istiod::raft::machine::StateMachine;
use istiod::raft::state_machine::Mesh;
use registry::config::{Kind, Object};
use registry::state::{Batch, Command as Change, Put, State};
use serde_json::json;

/// Changes that are stored and shown together, as under many writers.
const TOGETHER: usize = 8;
/// Bytes that differ from change to change.
const VALUE: usize = 1024;
/// Objects and changes, unless others are asked for.
const COUNTS: [usize; 2] = [1000, 20_000];

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[expect(clippy::print_stdout, reason = "a benchmark prints its figures")]
#[expect(clippy::disallowed_methods, reason = "a benchmark takes the time from outside")]
fn main() -> anyhow::Result<()> {
    let [objects, changes] = counts()?;
    let (publisher, updates) = Publisher::new(&State::default());
    let mut mesh = Mesh::new(publisher);
    let mut index = 0;
    let mut numbers = 0..objects.max(1) + changes;
    let mut applied = |mesh: &mut Mesh, count: usize| -> anyhow::Result<usize> {
        let commands: Result<Vec<_>, _> =
            numbers.by_ref().take(count).map(|number| command(number % objects.max(1))).collect();
        let (commands, began) = (commands?, Instant::now());
        let mut bytes = 0;
        for together in commands.chunks(TOGETHER) {
            for command in together {
                index += 1;
                mesh.apply(index, command)?;
            }
            let writes = mesh.take_writes()();
            bytes += writes.iter().map(|write| write.value.as_ref().map_or(0, Vec::len)).sum::<usize>();
            mesh.publish(index, began);
        }
        println!(
            "{count} changes, {:.1?} each, {} bytes stored",
            began.elapsed() / u32::try_from(count)?,
            bytes / count
        );
        Ok(bytes)
    };
    applied(&mut mesh, objects.max(1))?;
    applied(&mut mesh, changes)?;
    drop(updates);
    Ok(())
}

/// The bytes of a change as the admin API proposes it.
fn command(number: usize) -> anyhow::Result<Vec<u8>> {
    let name = format!("value-{number}");
    let spec = json!({
        "hosts": [format!("{name}.example")], "resolution": "DNS",
        "ports": [{"number": 80, "name": "http", "protocol": "HTTP"}],
    });
    let mut object = Object::new(Kind::ServiceEntry, "default", &name, spec);
    let value: String = std::iter::repeat_with(fastrand::alphanumeric).take(VALUE).collect();
    object.annotations.insert("value".to_owned(), value);
    let put = Put { object: Arc::new(object), expected: None };
    let batch = Batch {
        time_ms: 1_800_000_000_000,
        author: "token writer".to_owned(),
        commands: vec![Change::Change { puts: vec![put], deletes: Vec::new() }],
    };
    let origin = Origin {
        who: "token writer".to_owned(),
        from: "127.0.0.1:40000".to_owned(),
        at_ms: 1_800_000_000_000,
        action: format!("replace ServiceEntry/default/{name}"),
    };
    Ok(Command::Registry(batch).encode_as(&origin)?)
}

/// The numbers that the command line says.
fn counts() -> anyhow::Result<[usize; 2]> {
    let told: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with("--")).collect();
    if told.is_empty() {
        return Ok(COUNTS);
    }
    let numbers: Result<Vec<usize>, _> = told.iter().map(|word| word.parse()).collect();
    numbers.context("not a number")?.try_into().map_err(|_| anyhow::anyhow!("wanted: OBJECTS CHANGES"))
}
