//! Several machines on one: network namespaces behind a bridge, for tests that need root.

use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, anyhow, ensure};
use nix::sched::{CloneFlags, setns};

/// How long a connection may take to come about.
const CONNECT: Duration = Duration::from_secs(5);

/// Whether this process may make network namespaces.
#[must_use]
pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Machines on one network, which are gone when this is dropped. The first is the one that has the bridge.
#[derive(Debug)]
pub struct Lan {
    /// The machines, in the order of their names as given.
    pub machines: Vec<Machine>,
}

/// One machine.
#[derive(Debug, Clone)]
pub struct Machine {
    /// Name of its namespace.
    pub namespace: String,
    /// Its address on the network, with prefix length 24.
    pub v4: Ipv4Addr,
    /// Its address on the network, with prefix length 64.
    pub v6: Ipv6Addr,
}

impl Lan {
    /// So many machines. Every address that none of them has is behind the first.
    ///
    /// # Errors
    ///
    /// When this is not root, or iproute2 is not there.
    pub fn new(machines: u8) -> anyhow::Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let base = format!("mesh-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let machine = |number: u8| Machine {
            namespace: format!("{base}-{number}"),
            v4: Ipv4Addr::new(10, 99, 0, number + 1),
            v6: Ipv6Addr::new(0xfd99, 0, 0, 0, 0, 0, 0, u16::from(number) + 1),
        };
        // Made first, so that a failure half way removes what is there.
        let lan = Self { machines: (0..machines).map(machine).collect() };
        for machine in &lan.machines {
            ip(&["netns", "add", &machine.namespace])?;
            machine.ip(&["link", "set", "lo", "up"])?;
        }
        let (first, others) = lan.machines.split_first().context("no machine")?;
        first.ip(&["link", "add", "lan", "type", "bridge"])?;
        first.address("lan")?;
        for (number, machine) in others.iter().enumerate() {
            let port = format!("port{number}");
            let peer = ["peer", "name", &port, "netns", &first.namespace];
            machine.ip(&[&["link", "add", "lan", "type", "veth"][..], &peer].concat())?;
            first.ip(&["link", "set", &port, "master", "lan", "up"])?;
            machine.address("lan")?;
            machine.ip(&["route", "add", "default", "via", &first.v4.to_string()])?;
            machine.ip(&["-6", "route", "add", "default", "via", &first.v6.to_string()])?;
        }
        Ok(lan)
    }

    /// The machine with this number.
    ///
    /// # Errors
    ///
    /// When there are fewer.
    pub fn machine(&self, number: usize) -> anyhow::Result<&Machine> {
        self.machines.get(number).context("fewer machines")
    }
}

impl Drop for Lan {
    fn drop(&mut self) {
        for machine in &self.machines {
            // What was not made cannot be removed; there is nobody to tell.
            ip(&["netns", "delete", &machine.namespace]).unwrap_or_default();
        }
    }
}

impl Machine {
    fn ip(&self, args: &[&str]) -> anyhow::Result<()> {
        ip(&[&["-n", &self.namespace], args].concat())
    }

    fn address(&self, device: &str) -> anyhow::Result<()> {
        self.ip(&["link", "set", device, "up"])?;
        self.ip(&["addr", "add", &format!("{}/24", self.v4), "dev", device])?;
        self.ip(&["addr", "add", &format!("{}/64", self.v6), "dev", device, "nodad"])
    }

    /// Lets nothing from this machine reach another one, or all of it again. Only one way: the other end does the same.
    ///
    /// # Errors
    ///
    /// When this is not root.
    pub fn cut_off(&self, from: &Self, cut: bool) -> anyhow::Result<()> {
        let action = if cut { "add" } else { "delete" };
        self.ip(&["route", action, "blackhole", &format!("{}/32", from.v4)])
    }

    /// Its address of a family.
    #[must_use]
    pub fn address_of(&self, v6: bool) -> IpAddr {
        if v6 { self.v6.into() } else { self.v4.into() }
    }

    /// Does something on this machine: sockets that it makes and programs that it starts are there and stay there.
    ///
    /// # Errors
    ///
    /// When the machine is gone, and what `work` gives.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> anyhow::Result<T> + Send) -> anyhow::Result<T> {
        let namespace = File::open(format!("/run/netns/{}", self.namespace))?;
        // A namespace belongs to a thread: this one ends with the work.
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                setns(&namespace, CloneFlags::CLONE_NEWNET)?;
                work()
            });
            thread.join().map_err(|_| anyhow!("the work on {} panicked", self.namespace))?
        })
    }

    /// A socket that listens on all addresses of a family.
    ///
    /// # Errors
    ///
    /// When the port is taken.
    pub fn listen(&self, v6: bool, port: u16) -> anyhow::Result<TcpListener> {
        let any = if v6 { IpAddr::from(Ipv6Addr::UNSPECIFIED) } else { Ipv4Addr::UNSPECIFIED.into() };
        self.inside(|| Ok(TcpListener::bind((any, port))?))
    }

    /// Connects from this machine.
    ///
    /// # Errors
    ///
    /// When nobody takes the connection.
    pub async fn connect(&self, to: SocketAddr) -> anyhow::Result<tokio::net::TcpStream> {
        let machine = self.clone();
        let connecting = tokio::task::spawn_blocking(move || {
            machine.inside(|| {
                let stream =
                    TcpStream::connect_timeout(&to, CONNECT).with_context(|| format!("connect to {to}"))?;
                stream.set_nonblocking(true)?;
                Ok(stream)
            })
        });
        Ok(tokio::net::TcpStream::from_std(connecting.await??)?)
    }

    /// Runs a program on this machine to its end; its standard output.
    ///
    /// # Errors
    ///
    /// When it does not succeed, with what it said.
    pub fn run(&self, program: &str, args: &[&str]) -> anyhow::Result<String> {
        self.inside(|| run(program, args))
    }
}

fn ip(args: &[&str]) -> anyhow::Result<()> {
    run("ip", args).map(drop)
}

fn run(program: &str, args: &[&str]) -> anyhow::Result<String> {
    let output =
        Command::new(program).args(args).output().with_context(|| format!("cannot run {program}"))?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} {}: {}", args.join(" "), error.trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
