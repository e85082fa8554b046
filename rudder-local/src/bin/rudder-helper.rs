//! Runs the network of a kept lab, for embedding programs that do not do so themselves: see `rudder_local::helper`.

fn main() {
    rudder_local::helper::run();
}
