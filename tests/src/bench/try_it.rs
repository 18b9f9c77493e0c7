use super::cycles::*;
use super::road::*;
use std::time::Duration;

fn spec(gate: Gate) -> RoadSpec {
    RoadSpec {
        gate,
        links: match std::env::var("L").as_deref() { Ok("d") => Links::Direct, Ok("a") => Links::Alone, _ => Links::Split },
        guests: 64,
        ports: 1000,
        max_flows: 1 << 20,
        extra: "snat: { profile: natgateway }\ntimeouts: { tcpFinSeconds: 65 }\n".into(),
    }
}

#[test]
#[ignore]
fn crr() {
    let at_once: usize = std::env::var("N").map_or(64, |n| n.parse().unwrap());
    let ms: u64 = std::env::var("MS").map_or(500, |n| n.parse().unwrap());
    let mut roads: Vec<_> = [Gate::Forwarding, Gate::Nftables, Gate::Xdp, Gate::Tc]
        .into_iter()
        .map(|gate| {
            let road = Road::build(&spec(gate)).unwrap();
            let mut cycles = Cycles::listen(&road, 256).unwrap();
            if let Err(e) = cycles.run(&road, 16, 512) { println!("{e:#} {:?} {}\n{}", road.reasons(), road.ask(&["drops"]).unwrap(), road.ask(&["status"]).unwrap()); panic!(); }
            println!("{gate:?}: {:?} {:?}", cycles.count(), road.reasons().unwrap_or_default());
            (road, cycles)
        })
        .collect();
    for _ in 0..4 {
        for (road, cycles) in &mut roads {
            let m =
                cycles.measure(road, at_once, Duration::from_millis(50), Duration::from_millis(ms)).unwrap();
            println!("{:?}: {m:?} {:.2} us", road.gate, m.gateway_seconds * 1e6);
        }
    }
    for (road, cycles) in &mut roads {
        println!("{:?}: {:?} {:?}", road.gate, cycles.count(), road.reasons().unwrap_or_default());
    }
}

fn gates() -> Vec<Gate> {
    std::env::var("G").unwrap_or("fnxt".into()).chars().map(|c| match c { 'f' => Gate::Forwarding, 'n' => Gate::Nftables, 'x' => Gate::Xdp, _ => Gate::Tc }).collect()
}
